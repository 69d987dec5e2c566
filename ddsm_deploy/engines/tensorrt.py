"""TensorRT and TensorRT-RTX engines on NVIDIA GPUs, by NVIDIA's bindings and cuda-bindings; no torch.

A call copies its images to pinned memory, and from there on everything is one stream's work: to the GPU, through the
engine, back. An engine of fixed sizes is recorded as a CUDA graph once and launched since; TensorRT-RTX does that by
itself, and compiles its kernels for the GPU at the first run, which a cache on disk spares all later processes.

No GPU has run an engine yet: what needs none is tested, the rest is marked `gpu` in the tests. On an H100 TensorRT-RTX
1.7.1 refuses every engine, as it has none for that GPU; `why_no_engines` knows that beforehand.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.cache import cache_folder
from ddsm_deploy.enginefile import EngineRecord, misfit, read_engine, rebuild_line
from ddsm_deploy.engines import cuda
from ddsm_deploy.engines.base import Array, BaseEngine, EngineOptions, TensorInfo, choose_outputs, graph_precision
from ddsm_deploy.engines.buffers import check_sizes
from ddsm_deploy.engines.devicearray import check_fit, view
from ddsm_deploy.engines.slot import Slot
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.files import replacing

CONTEXTS = 2
"""Inferences at once where nothing else is said: one computes while another copies."""

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_LOGGERS: dict[str, Any] = {}  # NVIDIA's library takes one logger a process and ignores any later one


class TensorRtEngine(BaseEngine):
    """An engine file, with as many execution contexts as `EngineOptions.streams`; a call waits for a free one.

    Attributes:
        gpu: what runs it.
        record: the engine's.
        cuda_graph: whether the engine is launched as a CUDA graph; `cuda_graph_reason` says why not.
    """

    backend = "tensorrt"

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        options.only(self.backend, "streams")
        if options.threads not in (None, 1):
            raise ConfigError(
                f"{self.backend} computes on the GPU and has no option 'threads' (it is {options.threads})"
            )
        path = artifact.file("engine")
        self.record = read_engine(path)
        self.precision = graph_precision(self.backend, artifact, options)
        self.sampling = _sampling(self.record, path, options)
        trt = load_library(self.backend)
        self._logger = _logger(trt)
        self._check_fit(path, trt.__version__, None)  # what needs no GPU to be seen comes first
        self.gpu = cuda.require_gpu()
        if reason := why_no_engines(self.backend, self.gpu):
            raise BackendError(reason)
        self._check_fit(path, trt.__version__, self.gpu.compute_capability)
        self._engine: Any = _deserialize(trt, self._logger, self.record, path)
        tensors = _tensors(trt, self._engine)
        self.inputs = tuple(info for info, is_input in tensors if is_input)
        available = tuple(info for info, is_input in tensors if not is_input)
        self.outputs = choose_outputs(self.backend, available, options.outputs)
        self.cuda_graph, self.cuda_graph_reason = False, ""
        self._slots: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._ending = threading.Lock()
        self._all: list[Slot] = []
        self._configure(trt)
        try:
            for _ in range(options.streams or CONTEXTS):
                slot = Slot(self._made_context(), self.inputs, available, self.record.profiles, _last_error)
                self._all.append(slot)
                self._slots.put(slot)
            if not any(None in info.shape for info in self.inputs):
                self._warm_up()
        except BaseException:
            self.close()
            raise

    @classmethod
    def precisions(cls) -> tuple[str, ...]:
        """See `BaseEngine.precisions`: what engines of a float32 model can be built at."""
        load_library(cls.backend)  # that it is missing comes before what is wrong with the GPU
        if reason := why_no_engines(cls.backend, cuda.require_gpu()):
            raise BackendError(reason)
        return ("fp32", "fp16")

    def run_device(self, feeds: Mapping[str, Any], outputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One inference on arrays that lie on the GPU already; it returns once it is done.

        Args:
            feeds: input name -> array with ``__cuda_array_interface__`` or ``__dlpack__``, C-contiguous. What its
                stream still holds is waited for.
            outputs: output name -> array to write to, likewise; those left out are made.

        Returns:
            Output name -> the array given, or a `DeviceArray`.

        Raises:
            InputError: an array is missing, unknown, not on the GPU, or of the wrong type or shape.
            BackendError: CUDA or TensorRT failed, or the engine is closed.
        """
        if self._closed:
            raise self._closed_error()
        _check_names(feeds, self.inputs, all_of_them=True)
        _check_names(outputs or {}, self.outputs, all_of_them=False)
        with self._slot() as slot:
            found = {}
            for info in self.inputs:
                found[info.name] = view(feeds[info.name], name=info.name, stream=slot.stream.handle)
                check_fit(found[info.name], info)
                check_sizes(info, found[info.name].shape, self.record.profiles.get(info.name))
            return slot.run_device(found, outputs or {}, self.outputs)

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        for info in self.inputs:
            check_sizes(info, feeds[info.name].shape, self.record.profiles.get(info.name))
        with self._slot() as slot:
            return slot.run(feeds, self.outputs)

    def _release(self) -> None:
        with self._ending, contextlib.suppress(queue.Empty):
            while True:  # a slot in use is closed by its user
                slot = self._slots.get_nowait()
                if slot is not None:
                    slot.close()
        self._slots.put(None)
        self._engine = None

    @contextlib.contextmanager
    def _slot(self) -> Iterator[Slot]:
        """A free slot; while it is waited for or used, the engine may be closed."""
        slot = self._slots.get()
        if slot is None:  # closed while we waited; told on to the next one who waits
            self._slots.put(None)
            raise self._closed_error()
        try:
            cuda.use(self.gpu)
            yield slot
        finally:
            with self._ending:
                if self._closed:
                    slot.close()
                else:
                    self._slots.put(slot)

    def _check_fit(self, path: Path, version: str, compute_capability: str | None) -> None:
        problem = misfit(
            self.record, path, backend=self.backend, version=version, compute_capability=compute_capability
        )
        if problem:
            raise BackendError(problem)

    def _warm_up(self) -> None:
        for slot in self._all:
            slot.execute()
            slot.stream.wait()
            self.cuda_graph_reason = self._record_graph(slot)
            self.cuda_graph = not self.cuda_graph_reason
        self._keep_compiled()

    def _record_graph(self, slot: Slot) -> str:
        """Makes a CUDA graph of a slot's work; returns why not, where that can't be done."""
        try:
            with slot.stream.capturing() as made:
                slot.execute()
        except BackendError as exc:
            return str(exc)
        slot.graph = made[0]
        return ""

    def _made_context(self) -> Any:
        self._logger.errors.clear()
        context = self._create_context()
        if context is None:
            raise BackendError(f"the engine gives no execution context: {_last_error()}")
        return context

    def _configure(self, trt: Any) -> None:
        """What must be set before the first context."""

    def _create_context(self) -> Any:
        return self._engine.create_execution_context()

    def _keep_compiled(self) -> None:
        """Keeps what was compiled at the first run, for a backend that compiles then."""


class TensorRtRtxEngine(TensorRtEngine):
    """The same for TensorRT-RTX, which compiles at the first run and records CUDA graphs by itself."""

    backend = "tensorrt-rtx"

    def _configure(self, trt: Any) -> None:
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._compiled: Any = config.create_runtime_cache()
        self._cache_file = compiled_file(self.record, self.gpu)
        with contextlib.suppress(OSError):  # none yet
            self._compiled.deserialize(self._cache_file.read_bytes())  # False for another driver's: then it stays empty
        config.set_runtime_cache(self._compiled)
        self._config: Any = config  # must live as long as the contexts

    def _create_context(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def _record_graph(self, slot: Slot) -> str:
        return ""  # its own strategy records one

    def _keep_compiled(self) -> None:
        kept = bytes(self._compiled.serialize())
        with contextlib.suppress(InputError, OSError):  # a cache that can't be written costs time, nothing else
            if not self._cache_file.is_file() or self._cache_file.read_bytes() != kept:
                with replacing(self._cache_file) as temporary:
                    temporary.write_bytes(kept)

    def _release(self) -> None:
        self._keep_compiled()  # with the kernels of the sizes that were met since
        super()._release()
        self._compiled = self._config = None


def load_library(backend: str) -> Any:
    """NVIDIA's module for a backend.

    Raises:
        ImportError: it is not installed, or one of its libraries is not found.
    """
    return importlib.import_module(_MODULES[backend])


def why_no_engines(backend: str, gpu: cuda.Gpu) -> str:
    """Why a library has no engine for a GPU, however it is built; empty where it has, or does not say for which it has.

    Raises:
        ImportError: see `load_library`.
    """
    trt = load_library(backend)
    kinds = getattr(trt, "ComputeCapability", None)  # TensorRT-RTX's; TensorRT builds for the GPU that it is on
    if kinds is None or f"SM{gpu.compute_capability}" in kinds.__members__:
        return ""
    numbers = sorted((name.removeprefix("SM") for name in kinds.__members__ if name.startswith("SM")), key=int)
    return (
        f"{backend} {trt.__version__} has no engines for {gpu.name} (compute capability {gpu.compute_capability}), "
        f"only for {', '.join(numbers)}; use TensorRT there, or ONNX Runtime with --provider cuda"
    )


def compiled_file(record: EngineRecord, gpu: cuda.Gpu) -> Path:
    """Where TensorRT-RTX's compiled kernels of an engine are kept, for one kind of GPU and driver."""
    name = f"{record.sha256[:16]}-sm{gpu.compute_capability}-{gpu.driver}-{record.version}.bin"
    return cache_folder() / "tensorrt-rtx" / name


def _logger(trt: Any) -> Any:
    """The process's logger for a library: keeps the last errors, prints nothing."""
    if trt.__name__ not in _LOGGERS:

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: collections.deque[str] = collections.deque(maxlen=8)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.Logger.INTERNAL_ERROR, trt.Logger.ERROR):
                    self.errors.append(" ".join(message.split()))

        _LOGGERS[trt.__name__] = Logger()
    return _LOGGERS[trt.__name__]


def _last_error() -> str:
    said = [error for logger in _LOGGERS.values() for error in logger.errors]
    return said[-1] if said else "no reason was given"


def _sampling(record: EngineRecord, path: Path, options: EngineOptions) -> str:
    """How an engine samples, which its building has decided. A plugin's kernel lies in the engine itself."""
    built = record.sampling or record.spec.provenance.get("sampling", "portable")
    wanted = options.sampling
    if wanted is None or wanted == built:
        return built
    cure = "leave open how it is to sample"
    if record.target == "tensorrt" and built != "gather":
        cure = f"build another with: {rebuild_line(record, path, sampling=wanted)}"
    raise BackendError(f"{path} was built with {built} sampling, not {wanted}; {cure}")


def _deserialize(trt: Any, logger: Any, record: EngineRecord, path: Path) -> Any:
    logger.errors.clear()
    try:
        runtime = trt.Runtime(logger)
    except TypeError as exc:  # pybind11's way of saying that the factory gave no runtime
        raise BackendError(f"{_MODULES[record.target]} can't start: {_last_error()}") from exc
    blob = path.read_bytes()
    if hasattr(runtime, "get_engine_validity"):
        reason = _why_invalid(trt, *runtime.get_engine_validity(blob))
        if reason:
            raise BackendError(f"{path}: {reason}; build it anew with: {rebuild_line(record, path)}")
    if record.options.get("version_compatible"):
        runtime.engine_host_code_allowed = True  # such an engine carries the library's own lean runtime
    engine = runtime.deserialize_cuda_engine(blob)
    if engine is None:
        raise ArtifactError(
            f"{path}: {record.target} can't load it ({_last_error()}); build it anew with: {rebuild_line(record, path)}"
        )
    return engine


def _why_invalid(trt: Any, validity: Any, diagnostics: int) -> str:
    """What TensorRT-RTX finds wrong with an engine on this GPU, in words; empty where it would run."""
    if validity != trt.EngineValidity.INVALID:
        return ""
    names = [flag.name for flag in trt.EngineInvalidityDiagnostics.__members__.values() if int(diagnostics) & int(flag)]
    said = " and ".join(_WHY_INVALID.get(name, name.lower()) for name in names)
    return said or "TensorRT-RTX finds it not valid here and does not say why"


_WHY_INVALID = {
    "VERSION_MISMATCH": "it is of another version of TensorRT-RTX",
    "UNSUPPORTED_CC": "it was not built for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "NVIDIA's driver here is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime here is too old for it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is damaged",
    "CUDA_ERROR": "CUDA failed while it was looked at",
}


def _tensors(trt: Any, engine: Any) -> list[tuple[TensorInfo, bool]]:
    """The engine's inputs and outputs, and whether each is an input."""
    found = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        shape = tuple(None if size < 0 else int(size) for size in engine.get_tensor_shape(name))
        info = TensorInfo(name=name, dtype=np.dtype(trt.nptype(engine.get_tensor_dtype(name))), shape=shape)
        found.append((info, engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT))
    return found


def _check_names(arrays: Mapping[str, Any], infos: tuple[TensorInfo, ...], *, all_of_them: bool) -> None:
    names = [info.name for info in infos]
    for name in arrays:
        if name not in names:
            raise InputError(f"unknown array {name!r}; expected {', '.join(names)}")
    missing = [name for name in names if name not in arrays] if all_of_them else []
    if missing:
        raise InputError(f"{missing[0]!r} is missing; expected {', '.join(map(str, infos))}")
