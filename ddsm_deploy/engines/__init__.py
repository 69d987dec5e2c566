"""Engines: one file a backend, behind one Protocol. Numpy in, numpy out.

Importing this package loads no runtime; `open_engine` loads the one it is asked for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import platform
import sys

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact
from ddsm_deploy.endpoint import read_endpoint
from ddsm_deploy.enginefile import read_record
from ddsm_deploy.engines.base import (
    SAMPLINGS,
    BaseEngine,
    Engine,
    EngineOptions,
    TensorInfo,
    graph_sampling,
    in_words,
)
from ddsm_deploy.errors import BackendError, BackendMissing, ConfigError
from ddsm_deploy.spec import PRECISIONS

__all__ = [
    "BACKENDS",
    "FILE_KINDS",
    "SAMPLINGS",
    "SPECIAL_KINDS",
    "BackendStatus",
    "Engine",
    "EngineOptions",
    "TensorInfo",
    "available_precisions",
    "in_words",
    "open_engine",
    "possible_precisions",
    "runs_at",
    "samples",
    "select",
    "usable_backends",
    "why_untried",
]

BACKENDS = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "triton")

FILE_KINDS = {
    "torch": "checkpoint",
    "onnxruntime": "onnx",
    "openvino": "onnx",
    "tensorrt": "engine",
    "tensorrt-rtx": "engine",
    "triton": "endpoint",
}
"""The kind of file, of `ddsm_deploy.artifact.KINDS`, that each backend runs."""

SPECIAL_KINDS = ("engine", "endpoint")
"""Those without which a model is no less whole: their backends count only where the model has one."""

_MAKES = {
    "torch": {"bf16": "fp32", "fp16": "fp32"},
    "openvino": {"bf16": "fp32", "int8+bf16": "int8"},
}
"""Backend -> precisions that it makes by itself -> what the file is written in. All others are in the graph."""

_UNASKED = ("bf16", "int8+bf16")
"""Those that are tried unasked. torch's fp16 is not: on CPUs it is slow, and shows what rounding to float16 does."""

_EXTRAS = {
    "torch": "train",
    "onnxruntime": "cpu",
    "openvino": "cpu",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "triton": "triton",
}
_NEEDS = {
    "torch": ("torch", "timm", "safetensors"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda"),
    "triton": ("tritonclient", "grpc"),
}
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx",),
    "triton": ("tritonclient",),
}
_DRIVERS = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """Whether a backend is installed here.

    Attributes:
        backend: one of `BACKENDS`.
        available: whether it can be imported, as far as can be told without importing it.
        version: of the installed runtime, or an empty text.
        reason: why not, with the pip line that brings it; empty where available.
    """

    backend: str
    available: bool
    version: str = ""
    reason: str = ""


def open_engine(artifact: Artifact, backend: str, options: EngineOptions | None = None) -> Engine:
    """Loads a model into a runtime. What is asked for runs, or an error says what is missing: nothing falls back.

    Of a bundle's files the one runs that is written in ``options.precision`` (see `select`).

    Raises:
        ConfigError: no such backend, or it lacks one of the options.
        ArtifactError: the model has no file for it, or the runtime finds the file damaged.
        BackendMissing: the runtime is not installed.
        BackendError: it can't do what was asked for here, or no file of the model is written so.
    """
    options = options or EngineOptions()
    engine_class = _engine_class(backend)
    return engine_class(select(artifact, backend, options.precision), options)


def select(artifact: Artifact, backend: str, precision: str | None = None) -> Artifact:
    """The part of a model that a backend runs at a precision: the model itself or one of its variants.

    Args:
        artifact: the model. Where it is one file alone, that is the answer: its engine says whether it can.
        backend: one of `BACKENDS`.
        precision: None is the model's own.

    Raises:
        ArtifactError: it has no file of the backend's kind.
        BackendError: it has none that is written so; the message lists what there is.
    """
    kind = FILE_KINDS[backend]
    if not any(kind in part.files for part in (artifact, *artifact.variants)):
        artifact.file(kind)  # raises, and says what to run
    if not artifact.variants:
        return artifact
    wanted = precision or artifact.spec.precision
    made_from = _MAKES.get(backend, {}).get(wanted)
    written = (wanted,) if made_from is None else (wanted, made_from)
    part = artifact.pick(kind, precisions=written, target=backend)
    if part is None:
        possible = possible_precisions(artifact, backend)
        instead = f"ask for {' or '.join(possible)}, or add it" if possible else "add one"
        raise BackendError(
            f"{artifact.name} has no file for {backend} at {wanted} ({kind} {' or '.join(written)}), only "
            f"{artifact.contents()}; {instead}; a file of another backend runs only where it is named itself"
        )
    return part


def possible_precisions(artifact: Artifact, backend: str) -> tuple[str, ...]:
    """What is worth trying on a backend with the model's files that are for it, the model's own first. Loads nothing.

    Whether this machine can is another question: `open_engine` says.
    """
    kind = FILE_KINDS[backend]
    parts = [part for part in artifact.parts() if kind in part.files]
    if artifact.variants:
        parts = [part for part in parts if part.target in ("", backend)]
    written = [part.spec.precision for part in parts]
    made = [made for made, base in _MAKES.get(backend, {}).items() if made in _UNASKED and base in written]
    return tuple(sorted({*written, *made}, key=PRECISIONS.index))


def runs_at(backend: str, part: Artifact) -> tuple[str, ...]:
    """What a backend computes in with one file on this machine, the file's own precision first. Loads the runtime.

    Raises:
        BackendMissing: it is not installed.
    """
    written = part.spec.precision
    able = available_precisions(backend)
    makes = _MAKES.get(backend, {})
    made = [p for p in _UNASKED if makes.get(p) == written and p.removeprefix("int8+") in able]
    return (written, *made)


def available_precisions(backend: str) -> tuple[str, ...]:
    """What a backend can run a float32 model at on this machine, its default first. Loads the runtime.

    Raises:
        ConfigError: no such backend.
        BackendMissing: it is not installed.
    """
    return _engine_class(backend).precisions()


def why_untried(backend: str, precision: str, options: EngineOptions) -> str:
    """Why a precision that a file of the model has is not worth measuring unasked; empty where it is. Loads nothing."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    if (backend, precision, options.provider) == ("onnxruntime", "fp16", "cpu") and on_x86:
        return "onnxruntime fp16 not tried (on x86 it computes in float32 all the same, with conversions between)"
    return ""


def samples(backend: str, artifact: Artifact) -> tuple[str, str]:
    """How a backend samples with a model's files where nothing is asked for; loads the kernels, but no runtime.

    Returns:
        ``fused``, ``portable`` or ``gather``, several joined by commas where its files differ, and why no better.

    Raises:
        ArtifactError: one is an engine, and damaged.
    """
    kind, problem = FILE_KINDS[backend], kernels.status().reason
    found: dict[str, str] = {}
    for part in artifact.parts():
        others = artifact.variants and part.target not in ("", backend)  # a file alone runs wherever it is named
        if kind not in part.files or others:
            continue
        if kind == "engine":
            sampling, note = read_record(part.file(kind)).sampling or "portable", ""
        elif kind == "endpoint":
            sampling, note = read_endpoint(part.file(kind)).sampling, ""
        elif backend == "torch":
            sampling, note = ("portable", problem) if problem else ("fused", "")
        else:
            sampling, note = graph_sampling(backend, part, EngineOptions(), problem=problem)
            halved = sampling == "fused" and backend == "openvino" and "fp16" in part.spec.precision
            if halved and not artifact.variants:  # only the runtime, which is not loaded here, knows the processor
                note = "portable where OpenVINO finds float16 arithmetic in the CPU"
        found[sampling] = found.get(sampling, "") or note
    return ", ".join(found), next((note for note in found.values() if note), "")


def usable_backends() -> list[BackendStatus]:
    """The state of every backend, told without loading any."""
    return [_status(backend) for backend in BACKENDS]


def _status(backend: str) -> BackendStatus:
    missing = [module for module in _NEEDS[backend] if not _findable(module)]
    if missing:
        problem = BackendMissing(backend, extra=_EXTRAS[backend], why=f"no module named {missing[0]!r}")
        return BackendStatus(backend, False, reason=str(problem))
    if backend.startswith("tensorrt") and not _has_driver():
        return BackendStatus(backend, False, reason=f"{backend} is installed, but no NVIDIA driver is")
    for distribution in _DISTRIBUTIONS[backend]:
        try:
            return BackendStatus(backend, True, version=importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue  # the same module also comes under another name
    return BackendStatus(backend, True, version="unknown")


def _has_driver() -> bool:
    """Whether NVIDIA's driver is installed; whether it finds a GPU is told by opening an engine."""
    try:
        ctypes.CDLL(_DRIVERS.get(sys.platform, "libcuda.so.1"))
    except OSError:
        return False
    return True


def _findable(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


def _engine_class(backend: str) -> type[BaseEngine]:
    try:
        match backend:
            case "torch":
                from ddsm_deploy.engines.torch import TorchEngine

                return TorchEngine
            case "onnxruntime":
                from ddsm_deploy.engines.onnxruntime import OnnxRuntimeEngine

                return OnnxRuntimeEngine
            case "openvino":
                from ddsm_deploy.engines.openvino import OpenVinoEngine

                return OpenVinoEngine
            case "tensorrt" | "tensorrt-rtx":
                from ddsm_deploy.engines.tensorrt import TensorRtEngine, TensorRtRtxEngine, load_library

                load_library(backend)
                return TensorRtEngine if backend == "tensorrt" else TensorRtRtxEngine
            case "triton":
                from ddsm_deploy.engines.triton import TritonEngine

                return TritonEngine
            case _:
                raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    except ImportError as exc:
        raise BackendMissing(backend, extra=_EXTRAS[backend], why=str(exc).splitlines()[0]) from exc
