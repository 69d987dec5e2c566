"""The child process of one build. It alone imports NVIDIA's library; `builder` starts it and reads what it says.

A process of its own for each build, because the library's logger is one for the process, because a failed build for
compute capability 75 makes the next one larger (seen in TensorRT-RTX 1.7.1), and because some errors end the process.

It reads one job, a JSON object, from standard input, and writes one JSON object a line to what was standard output.
Only the standard library and `log` are used besides, and `plugin` for a graph that needs it.
"""

from __future__ import annotations

import collections
import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from ddsm_deploy.export.tensorrt import log as texts

LIBRARIES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Target -> the module that builds for it."""

_STEP = 0.002  # smallest growth of the finished share that is told


class JobError(Exception):
    """The build failed; the text is NVIDIA's reason or ours, `node` the ONNX node that it names."""

    def __init__(self, text: str, node: str = "") -> None:
        super().__init__(text)
        self.node = node


class Out:
    """The way back to the parent. `open` turns false once the parent has gone, and that ends the build."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.open = True

    def __call__(self, event: str, **fields: Any) -> None:
        try:
            self.stream.write(json.dumps({"event": event, **fields}) + "\n")
            self.stream.flush()
        except OSError:
            self.open = False


def main() -> None:
    """Does the one job."""
    out = Out(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # the library prints to standard output as well
    job = json.load(sys.stdin)
    try:
        trt = _library(job["target"])
        out("library", version=trt.__version__)
        out("done", **(_build(trt, job, out) if "onnx" in job else {}))
    except JobError as exc:
        out("failed", text=str(exc), node=exc.node)


def _restart_heap() -> bool:
    """Lets memory go on at the same place in every run, whatever came before, where the heap for that is preloaded."""
    try:
        restart = ctypes.CDLL(None).ddsm_heap_restart
    except (AttributeError, OSError, TypeError):  # not preloaded; or a system without such a thing
        return False
    return bool(restart() == 0)


def _library(target: str) -> Any:
    try:
        return importlib.import_module(LIBRARIES[target])
    except ImportError as exc:
        raise JobError(f"import: {exc}") from exc


def _build(trt: Any, job: dict[str, Any], out: Out) -> dict[str, Any]:
    logger = _logger(trt, out)
    repeatable = _restart_heap()
    try:
        builder = trt.Builder(logger)
    except TypeError as exc:  # pybind11's way of saying that the factory gave no builder
        raise JobError(f"its builder can't start: {texts.reason(logger.errors)}") from exc
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if job["plugin"]:
        _register_plugin(trt, job["plugin"])
    _parse(trt, network, logger, Path(job["onnx"]))
    _check_sampling(trt, network, job["sampling"], job["plugin"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the log tells of layers and their types
    config.progress_monitor = monitor = _monitor(trt, out)
    _set_options(trt, config, job)
    _set_profiles(builder, config, network, job["profiles"])
    blob = builder.build_serialized_network(network, config)
    if blob is None:
        if not out.open:
            sys.exit(1)
        raise JobError(texts.reason(logger.errors))
    Path(job["engine"]).write_bytes(bytes(blob))
    _keep_timing_cache(config, job)
    del monitor
    return {
        "inputs": [_tensor(trt, network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [_tensor(trt, network.get_output(i)) for i in range(network.num_outputs)],
        "layers": [[layer.kind, layer.dtype, list(layer.nodes)] for layer in texts.layers(logger.lines)],
        "repeatable": repeatable,
        "warnings": list(dict.fromkeys(logger.warnings))[:50],
    }


def _logger(trt: Any, out: Out) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                self.errors.append(message)
                out("message", text=message)  # at once: the process may not live to tell it later
            elif severity == trt.Logger.WARNING:
                self.warnings.append(message)
            elif message.startswith("Name: "):
                self.lines.append(message)
            elif "\nName: " in message:
                self.lines.extend(message.splitlines())

    return Logger()


def _monitor(trt: Any, out: Out) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Turns nested phases into one finished share, 0 to 1."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: list[list[Any]] = []  # name, steps, steps done; the outermost first
            self.told = -1.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.append([name, max(1, steps), 0])
            self.tell()

        def step_complete(self, name: str, step: int) -> bool:
            for phase in self.phases:
                if phase[0] == name:
                    phase[2] = min(step + 1, phase[1])
            self.tell()
            return out.open

        def phase_finish(self, name: str) -> None:
            self.phases = [phase for phase in self.phases if phase[0] != name]

        def tell(self) -> None:
            share = 0.0
            for _, steps, done in reversed(self.phases):
                share = min(1.0, (done + share) / steps)
            if share >= self.told + _STEP:
                self.told = share
                out("progress", phase=self.phases[-1][0], share=round(share, 4))

    return Monitor()


def _parse(trt: Any, network: Any, logger: Any, path: Path) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(path.read_bytes(), str(path)):
        return
    if not parser.num_errors:
        raise JobError(texts.reason(logger.errors))
    error = parser.get_error(0)
    raise JobError(texts.reason([error.desc()]), f"{error.node_operator()} {error.node_name()!r}")


def _register_plugin(trt: Any, job: dict[str, Any]) -> None:
    """Lets the parser find the sampling plugin."""
    from ddsm_deploy.errors import DdsmError
    from ddsm_deploy.export.tensorrt import plugin

    try:
        plugin.check_driver(job["driver"])
        plugin.register(trt, job["compute_capability"])
    except DdsmError as exc:
        raise JobError(f"its sampling plugin can't be made: {exc}") from exc


def _check_sampling(trt: Any, network: Any, wanted: list[str], plugin: dict[str, Any] | None) -> None:
    """Reads back how the parser took each GridSample: versions exist that took linear for nearest in silence.

    And that each sampling node has become the plugin, where there is to be one.
    """
    got, plugins = [], 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        plugins += layer.type == trt.LayerType.PLUGIN_V3
        if layer.type == trt.LayerType.GRID_SAMPLE:
            layer.__class__ = trt.IGridSampleLayer
            got.append(layer.interpolation_mode.name.lower())
    if collections.Counter(got) != collections.Counter(wanted):
        raise JobError(
            f"its parser misreads GridSample: the graph says {_tally(wanted)}, it took {_tally(got)}; export the model "
            "with --sampling gather"
        )
    if plugin and plugins != plugin["nodes"]:
        raise JobError(f"its parser made {plugins} sampling plugins of {plugin['nodes']} nodes")


def _tally(modes: list[str]) -> str:
    return ", ".join(f"{count} {mode}" for mode, count in sorted(collections.Counter(modes).items())) or "none"


def _set_options(trt: Any, config: Any, job: dict[str, Any]) -> None:
    """Sets what was asked for; what this library lacks is an error, for nothing that was asked for is left out."""
    if job["compute_capabilities"]:
        config.num_compute_capabilities = len(job["compute_capabilities"])
        for index, number in enumerate(job["compute_capabilities"]):
            value = getattr(trt.ComputeCapability, f"SM{number}", None)
            if value is None:
                known = sorted(name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if "SM" in name)
                raise JobError(f"it does not build for compute capability {number}, only for {', '.join(known)}")
            config.set_compute_capability(value, index)
    config.clear_flag(trt.BuilderFlag.TF32)  # what is written in float32 is computed in it, not in 19 bits of it
    if job["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job["workspace"])
    if job["builder_optimization_level"] is not None:
        config.builder_optimization_level = job["builder_optimization_level"]
    if job["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if job["hardware_compatible"]:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if job["timing_cache"] is not None:
        path = Path(job["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise JobError(f"{path} is not a timing cache of this version and GPU; name another file, or remove it")
    if job["dla_core"] is not None:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = job["dla_core"]
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)  # GridSample and its like run on no DLA


def _set_profiles(builder: Any, config: Any, network: Any, profiles: dict[str, list[list[int]]]) -> None:
    open_inputs = [network.get_input(i) for i in range(network.num_inputs) if -1 in network.get_input(i).shape]
    if not open_inputs:
        return
    profile = builder.create_optimization_profile()
    for tensor in open_inputs:
        profile.set_shape(tensor.name, *map(tuple, profiles[tensor.name]))
    if config.add_optimization_profile(profile) < 0:
        raise JobError("it refuses the profile; its three shapes must grow and fit the graph")


def _keep_timing_cache(config: Any, job: dict[str, Any]) -> None:
    if job["timing_cache"] is not None:
        path = Path(job["timing_cache"])
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
        temporary.replace(path)


def _tensor(trt: Any, tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": trt.nptype(tensor.dtype).__name__, "shape": list(tensor.shape)}


if __name__ == "__main__":
    main()
