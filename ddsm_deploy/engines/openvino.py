"""OpenVINO on CPUs. Its precision is always asked for and read back: by itself it runs bf16 wherever the CPU has it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines.base import Array, BaseEngine, EngineOptions, TensorInfo, choose_outputs, graph_sampling
from ddsm_deploy.engines.openvino_import import ov
from ddsm_deploy.engines.openvino_mask import join_mask
from ddsm_deploy.engines.openvino_op import pool_problem
from ddsm_deploy.engines.openvino_reader import SamplingReader
from ddsm_deploy.errors import ArtifactError, BackendError

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # our word -> OpenVINO's

_FLOATS = {  # what a file is written in -> our word for what runs -> the float type asked for
    "fp32": {"fp32": "fp32", "bf16": "bf16"},
    "fp16": {"fp16": "fp16", "fp32": "fp32", "bf16": "bf16"},
    "int8": {"int8": "fp32", "int8+bf16": "bf16"},
    "int8+fp16": {"int8+fp16": "fp16", "int8": "fp32", "int8+bf16": "bf16"},
}


class OpenVinoEngine(BaseEngine):
    """An ONNX file compiled for the CPU, with as many infer requests as it has streams; a call waits for a free one."""

    backend = "openvino"

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        options.only(self.backend, "streams", "hint")
        path = artifact.file("onnx")
        core = ov.Core()
        wanted = options.precision or _own_precision(core, artifact.spec.precision)
        float_type = _float_type(core, artifact, wanted)
        problem = kernels.problem(float_type)
        self.sampling, self.sampling_note = graph_sampling(self.backend, artifact, options, problem=problem)
        if self.sampling == "fused" and options.threads != 1 and (problem := pool_problem()):
            self.sampling_note = f"on one thread of each inference ({problem})"
        reader = SamplingReader(self.sampling, float_type)
        core.add_extension(reader.extension())
        try:
            model = _undisturbed(lambda: core.read_model(str(path)))
        except RuntimeError as exc:
            raise ArtifactError(f"{path}: openvino can't read it: {_last_line(exc)}") from exc
        if options.sampling != "portable" and not problem:  # who asks for that wants none of our kernels
            join_mask(model, reader, float_type)
        settings = _settings(float_type, artifact, options)
        try:
            self._compiled: Any = _undisturbed(lambda: core.compile_model(model, "CPU", settings))
        except RuntimeError as exc:
            raise BackendError(f"{path}: openvino can't compile it: {_last_line(exc)}") from exc
        active = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if active != _HINTS[float_type]:
            raise BackendError(f"openvino was asked for {float_type} and chose {active}")
        reader.compiled()
        self.precision = wanted
        self.inputs = tuple(map(_info, self._compiled.inputs))
        self.outputs = choose_outputs(self.backend, tuple(map(_info, self._compiled.outputs)), options.outputs)

        # with each request the reader, without which it can't sample: a running one may outlive this engine's closing
        self._requests: queue.SimpleQueue[tuple[Any, SamplingReader] | None] = queue.SimpleQueue()
        for _ in range(self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")):
            self._requests.put((self._compiled.create_infer_request(), reader))

    @classmethod
    def precisions(cls) -> tuple[str, ...]:
        """See `BaseEngine.precisions`."""
        return ("fp32", "bf16") if "BF16" in _capabilities(ov.Core()) else ("fp32",)

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        taken = self._requests.get()
        if taken is None:  # closed while we waited; told on to the next one who waits
            self._requests.put(None)
            raise self._closed_error()
        request, _ = taken
        try:
            _run(request, feeds)
            # copied, because the request goes back to the pool and is overwritten by the next call
            return {info.name: np.array(request.get_tensor(info.name).data) for info in self.outputs}
        except RuntimeError as exc:
            raise BackendError(f"openvino failed: {_last_line(exc)}") from exc
        finally:
            self._requests.put(taken)
            if self._closed:  # while we ran: nobody else gives this request's memory back
                self._release()

    def _release(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._requests.get_nowait()
        self._requests.put(None)
        self._compiled = None


def _run(request: Any, feeds: dict[str, Array]) -> None:
    """Computes on OpenVINO's own threads, never on ours, as `infer` does where there is but one: what is raised in our
    operators there is dropped (2026.4), a signal handler's exception as well, and the outputs are those of the call
    before."""
    try:
        request.start_async(feeds, share_inputs=True)
        request.wait()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # said already
            request.wait()  # interrupted, it still computes
        raise


def _undisturbed(call: Callable[[], Any]) -> Any:
    """Calls in a thread of its own: signal handlers run in the main thread alone, and what they raise while OpenVINO
    calls our reader and operators there would become an error of OpenVINO's."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    with concurrent.futures.ThreadPoolExecutor(1, "ddsm-compile") as pool:
        return pool.submit(call).result()


def _own_precision(core: Any, written: str) -> str:
    """What a file runs at where nothing is asked for: as written, except that few CPUs compute in float16."""
    if "fp16" in written and "FP16" not in _capabilities(core):
        return {"fp16": "fp32", "int8+fp16": "int8"}[written]
    return written


def _float_type(core: Any, artifact: Artifact, wanted: str) -> str:
    """The type of all arithmetic that is not INT8: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        BackendError: the file is not written so, or this CPU can't compute so.
    """
    written = artifact.spec.precision
    choices = _FLOATS.get(written, {})
    if wanted not in choices:
        raise BackendError(
            f"openvino runs {artifact.name}, which is written in {written}, at {' or '.join(choices) or 'nothing'}, "
            f"not at {wanted}"
        )
    float_type = choices[wanted]
    needs = {"bf16": ("BF16", "AVX512-BF16 or AMX"), "fp16": ("FP16", "float16 arithmetic, such as AMX-FP16")}
    capability, instructions = needs.get(float_type, ("FP32", ""))
    if capability not in _capabilities(core):
        name = core.get_property("CPU", "FULL_DEVICE_NAME")
        instead = wanted.replace("+" + float_type, "").replace(float_type, "fp32")
        raise BackendError(
            f"{wanted} on openvino needs a CPU with {instructions}, which this one ({name}) lacks; use {instead}"
        )
    return float_type


def _capabilities(core: Any) -> list[str]:
    return list(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _settings(float_type: str, artifact: Artifact, options: EngineOptions) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if artifact.spec.provenance.get("target") == "tensorrt":
        # Signed activations, TensorRT's form, lose accuracy in its INT8 kernels (2026.4: 1.3 % of the pixels changed on
        # CamVid val where the graph as written changes 0.65 %). Such a file is here to be checked, not to be quick.
        settings["LP_TRANSFORMS_MODE"] = "NO"
    settings |= {
        "INFERENCE_PRECISION_HINT": _HINTS[float_type],
        "PERFORMANCE_HINT": (options.hint or "latency").upper(),
    }
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    if options.streams is not None:
        settings["NUM_STREAMS"] = options.streams
    return settings


def _info(port: Any) -> TensorInfo:
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    return TensorInfo(name=port.get_any_name(), dtype=np.dtype(port.get_element_type().to_dtype()), shape=shape)


def _last_line(exc: Exception) -> str:
    """OpenVINO's messages begin with source positions and end with the reason; behind a Python one comes its trace."""
    text = str(exc).partition("\n\nAt:\n")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__
