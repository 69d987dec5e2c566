"""The parent's side of a build: starts the child process, passes progress on, makes its end a result or an error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy import kernels
from ddsm_deploy.enginefile import Profile, TensorRecord
from ddsm_deploy.errors import BackendError, BackendMissing
from ddsm_deploy.export.tensorrt.log import Layer
from ddsm_deploy.files import writing

NAMES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

_ONNX, _ENGINE, _HEAP = "graph.onnx", "graph.engine", "heap.so"
Progress = Callable[[str, float], None]
"""Called with the name of the phase and the finished share of the build, 0 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plugin:
    """The sampling plugin, for a graph that needs it.

    Attributes:
        compute_capability: of the GPU that the engine is built on, as ``86``.
        driver: the newest CUDA version that its driver serves, as ``13.0``.
        nodes: how many nodes of the graph must become one.
    """

    compute_capability: str
    driver: str
    nodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One build, as the child process is told of it.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        onnx: the graph, a strongly typed ONNX file.
        engine: where the engine is written.
        sampling: modes of the graph's GridSample nodes, which are read back from the parser.
        profiles: input -> its allowed sizes, for inputs that have open axes.
        plugin: tensorrt only: what the graph's sampling nodes become; None where it has none.
        compute_capabilities: tensorrt-rtx only: of the GPUs, as ``86``.
        workspace: most scratch memory of a layer, bytes; None leaves it to the library.
        timing_cache: tensorrt only: file of measured times, read and written.
        version_compatible: tensorrt only: later versions run it too.
        hardware_compatible: tensorrt only: other GPUs from Ampere on run it too.
        dla_core: tensorrt only: the DLA that takes what layers it can.
        builder_optimization_level: tensorrt only: 0 to 5.
    """

    target: str
    onnx: Path
    engine: Path
    sampling: tuple[str, ...] = ()
    profiles: Mapping[str, Profile] = dataclasses.field(default_factory=dict)
    plugin: Plugin | None = None
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    dla_core: int | None = None
    builder_optimization_level: int | None = None

    def to_json(self) -> str:
        """The job as the child reads it, in whose folder the two files have names of their own."""
        fields = dataclasses.asdict(self) | {"onnx": _ONNX, "engine": _ENGINE}
        if self.timing_cache is not None:
            fields["timing_cache"] = self.timing_cache.absolute()
        fields["profiles"] = {name: [p.min, p.opt, p.max] for name, p in self.profiles.items()}
        return json.dumps(fields, default=str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """What a child process built.

    Attributes:
        version: of the library.
        inputs: of the network; -1 for an open axis.
        outputs: likewise.
        layers: of the engine, from the verbose log.
        warnings: NVIDIA's, as they are.
        repeatable: the child had a heap of its own, on which equal jobs give equal bytes.
    """

    version: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    layers: tuple[Layer, ...]
    warnings: tuple[str, ...]
    repeatable: bool


def library_version(target: str) -> str:
    """The version of the library that builds for a target, as the library itself says.

    Raises:
        BackendMissing: it is not installed, or can't be loaded.
    """
    return str(_run(target, json.dumps({"target": target}), lambda phase, share: None, None)["version"])


def build(job: Job, progress: Progress | None = None) -> Built:
    """Builds an engine in a process of its own and waits for it. An interrupt ends that process at once.

    Raises:
        BackendMissing: the library is not installed.
        BackendError: it can't build the graph, or its process died; the message names the node where NVIDIA does.
    """
    with tempfile.TemporaryDirectory(prefix="ddsm-build-") as folder:
        with writing(Path(folder) / _ONNX):
            shutil.copyfile(job.onnx, Path(folder) / _ONNX)
        result = _run(job.target, job.to_json(), progress or (lambda phase, share: None), Path(folder))
        with writing(job.engine):
            shutil.copyfile(Path(folder) / _ENGINE, job.engine)
    return Built(
        version=result["version"],
        inputs=tuple(_tensor(fields) for fields in result["inputs"]),
        outputs=tuple(_tensor(fields) for fields in result["outputs"]),
        layers=tuple(Layer(kind, dtype, tuple(nodes)) for kind, dtype, nodes in result["layers"]),
        warnings=tuple(result["warnings"]),
        repeatable=result["repeatable"],
    )


def _tensor(fields: Mapping[str, Any]) -> TensorRecord:
    return TensorRecord(name=fields["name"], dtype=fields["dtype"], shape=tuple(fields["shape"]))


def _environment(target: str, folder: Path | None) -> dict[str, str]:
    """The child's environment.

    TensorRT-RTX 1.7.1 numbers the open sizes inside an engine by the addresses of its own objects, so the child gets a
    heap that lays them out alike in every run (`kernels/src/heap`). It is found in the child's folder, for a path with
    a space can't be preloaded.
    """
    environment = dict(os.environ)
    heap = kernels.heap_path()
    if target == "tensorrt-rtx" and folder is not None and heap is not None and _may_reserve_addresses():
        (folder / _HEAP).symlink_to(heap)
        environment["LD_PRELOAD"] = " ".join([f"./{_HEAP}", *filter(None, [environment.get("LD_PRELOAD")])])
        environment["PYTHONHASHSEED"] = "0"
    return environment


def _may_reserve_addresses() -> bool:
    """Whether a process here may take terabytes of addresses (not of memory), as that heap does."""
    if platform.machine() != "x86_64":
        return False  # not tried; some have too few
    import resource  # not on Windows

    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def _run(target: str, job: str, progress: Progress, folder: Path | None) -> dict[str, Any]:
    # -P: a file of the current folder must not pass for a module of the same name
    command = [sys.executable, "-P", "-m", "ddsm_deploy.export.tensorrt.worker"]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
            cwd=folder,
            env=_environment(target, folder),
            start_new_session=True,  # a Ctrl-C in the terminal is for the parent, which ends the child
        )
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it died at once, and why is told below
                process.stdin.write(job)
                process.stdin.close()
            result, said = _listen(process, target, progress)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if result is None:
            complaints.seek(0)
            raise _death(target, code, said, complaints.read().decode(errors="replace"))
        return result


def _listen(process: subprocess.Popen[str], target: str, progress: Progress) -> tuple[dict[str, Any] | None, str]:
    """Follows the child to its end: its result (None if it died), and the last error of NVIDIA's that it passed on."""
    version = said = ""
    result: dict[str, Any] | None = None
    assert process.stdout is not None
    for line in process.stdout:
        fields = json.loads(line)
        match fields.pop("event"):
            case "library":
                version = fields["version"]
            case "progress":
                progress(fields["phase"], fields["share"])
            case "message":
                said = fields["text"]
            case "failed":
                raise _failure(target, version, fields["text"], fields["node"])
            case "done":
                result = {"version": version, **fields}
    return result, said


def _failure(target: str, version: str, text: str, node: str) -> BackendError:
    if text.startswith("import: "):
        return BackendMissing(target, extra=target, why=text.removeprefix("import: ").splitlines()[0])
    who = f"{NAMES[target]} {version}"
    if text.startswith("it"):
        return BackendError(f"{who} can't build this: {text}")
    return BackendError(f"{who} can't build this graph: {f'{node}: ' if node else ''}{text}{_advice(text)}")


def _advice(text: str) -> str:
    if "OutOfMemory" in text or "out of memory" in text.lower() or "workspace" in text:
        return "; give it more with --workspace, or narrow the profile"
    if "FP32 GEMM is not supported" in text:
        return "; build it with --precision fp16"
    return ""


def _death(target: str, code: int, said: str, complaints: str) -> BackendError:
    lines = [line.strip() for line in complaints.splitlines() if line.strip()]
    last = said.splitlines()[0] if said else (lines[-1] if lines else "it said nothing")
    how = f"exit code {code}"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        how = f"{name}, most likely for want of memory" if -code == signal.SIGKILL else name
    return BackendError(f"{NAMES[target]}'s builder died ({how}): {last}")
