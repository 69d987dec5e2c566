"""Engines: one file a backend, behind one Protocol. Numpy in, numpy out.

Importing this package loads no runtime; `open_engine` loads the one it is asked for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines.base import BaseEngine, Engine, EngineOptions, TensorInfo
from ddsm_deploy.errors import BackendMissing, ConfigError

__all__ = [
    "BACKENDS",
    "FILE_KINDS",
    "BackendStatus",
    "Engine",
    "EngineOptions",
    "TensorInfo",
    "available_precisions",
    "open_engine",
    "usable_backends",
]

BACKENDS = ("torch", "onnxruntime", "openvino")

FILE_KINDS = {"torch": "checkpoint", "onnxruntime": "onnx", "openvino": "onnx"}
"""The kind of file, of `ddsm_deploy.artifact.KINDS`, that each backend runs."""

_EXTRAS = {"torch": "train", "onnxruntime": "cpu", "openvino": "cpu"}
_NEEDS = {"torch": ("torch", "timm", "safetensors"), "onnxruntime": ("onnxruntime",), "openvino": ("openvino",)}
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
}


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

    Raises:
        ConfigError: no such backend, or it lacks one of the options.
        ArtifactError: the model has no file for it, or the runtime finds the file damaged.
        BackendMissing: the runtime is not installed.
        BackendError: it can't do what was asked for here.
    """
    return _engine_class(backend)(artifact, options or EngineOptions())


def available_precisions(backend: str) -> tuple[str, ...]:
    """What a backend can run a float32 model at on this machine, its default first. Loads the runtime.

    Raises:
        ConfigError: no such backend.
        BackendMissing: it is not installed.
    """
    return _engine_class(backend).precisions()


def usable_backends() -> list[BackendStatus]:
    """The state of every backend, told without loading any."""
    return [_status(backend) for backend in BACKENDS]


def _status(backend: str) -> BackendStatus:
    missing = [module for module in _NEEDS[backend] if not _findable(module)]
    if missing:
        problem = BackendMissing(backend, extra=_EXTRAS[backend], why=f"no module named {missing[0]!r}")
        return BackendStatus(backend, False, reason=str(problem))
    for distribution in _DISTRIBUTIONS[backend]:
        try:
            return BackendStatus(backend, True, version=importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue  # the same module also comes under another name
    return BackendStatus(backend, True, version="unknown")


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
            case _:
                raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    except ImportError as exc:
        raise BackendMissing(backend, extra=_EXTRAS[backend], why=str(exc).splitlines()[0]) from exc
