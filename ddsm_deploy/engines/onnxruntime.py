"""ONNX Runtime on the CPU; on NVIDIA GPUs through its CUDA and TensorRT providers, when those are asked for."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime as ort

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines.base import (
    Array,
    BaseEngine,
    EngineOptions,
    TensorInfo,
    choose_outputs,
    graph_precision,
    graph_sampling,
)
from ddsm_deploy.errors import ArtifactError, BackendError, BackendMissing

_PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
_TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_FATAL = 4  # log level: everything below reaches us as an exception, so printing it too would say it twice
_DAMAGED = ("InvalidGraph", "InvalidProtobuf", "NoSuchFile")


class OnnxRuntimeEngine(BaseEngine):
    """An ONNX file in an `onnxruntime.InferenceSession`."""

    backend = "onnxruntime"

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        options.only(self.backend, "provider", "spinning")
        self.precision = graph_precision(self.backend, artifact, options)
        if self.precision == "int8+fp16" and options.provider == "cpu":
            # seen in 1.31: its fusions of float16 Q/DQ pairs refuse to load, or load and give other classes
            raise BackendError(
                f"onnxruntime computes INT8 with float16 ({artifact.name}) wrongly on CPUs; openvino runs it, "
                "or take the int8 file"
            )
        self.provider = options.provider
        self.sampling, self.sampling_note = graph_sampling(self.backend, artifact, options, problem=_problem(options))
        self._session: Any = _open_session(str(artifact.file("onnx")), options, fused=self.sampling == "fused")
        self.inputs = tuple(map(_info, self._session.get_inputs()))
        self.outputs = choose_outputs(self.backend, tuple(map(_info, self._session.get_outputs())), options.outputs)
        self._names = [info.name for info in self.outputs]

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        session = self._session
        if session is None:  # closed by another thread a moment ago
            raise self._closed_error()
        try:
            results = session.run(self._names, feeds)
        except Exception as exc:  # its errors share no base class below Exception
            raise BackendError(f"onnxruntime failed: {_first_line(exc)}") from exc
        return dict(zip(self._names, results, strict=True))

    def _release(self) -> None:
        self._session = None


def _problem(options: EngineOptions) -> str:
    """Why the fused kernels can't be used; empty where they can."""
    if options.provider != "cpu":
        return f"the kernels are for CPUs, and the provider is {options.provider}; leave out one of the two"
    return kernels.status().reason


def _open_session(path: str, options: EngineOptions, *, fused: bool) -> Any:
    wanted = _PROVIDERS[options.provider]
    if wanted[0] not in ort.get_available_providers():
        # onnxruntime-gpu holds the same module, and pip would lay one over the other
        raise BackendMissing(
            "onnxruntime",
            extra="gpu",
            why=f"the installed build has no {wanted[0]}",
            where="in a fresh environment without the extras cpu, train and quantize",
        )
    if options.provider != "cpu":
        ort.preload_dlls()  # finds CUDA and cuDNN where pip put them
    ort.disable_telemetry_events()  # Windows builds report usage otherwise

    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.log_severity_level = _FATAL
    settings.inter_op_num_threads = 1
    # uint8 × int8 products saturate in the 16-bit sums of processors without VNNI: there the exact kernels, if slower
    settings.add_session_config_entry("session.x64quantprecision", "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.spinning is not None:
        settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    if fused:
        register_kernels(settings)
    try:
        session = ort.InferenceSession(path, settings, providers=wanted)
    except Exception as exc:  # its errors share no base class below Exception
        kind = ArtifactError if type(exc).__name__ in _DAMAGED else BackendError
        raise kind(f"{path}: onnxruntime can't load it: {_first_line(exc)}") from exc
    session.disable_fallback()
    active = session.get_providers()[0]
    if active != wanted[0]:
        raise BackendError(
            f"onnxruntime could not start {wanted[0]} and would run on {active}; check NVIDIA's driver, CUDA and cuDNN"
        )
    return session


def register_kernels(settings: Any) -> None:
    """Gives a session the fused operator; it goes before the function of the same name that the file carries."""
    try:
        settings.register_custom_ops_library(str(kernels.library_path()))
    except Exception as exc:  # its errors share no base class below Exception
        raise BackendError(f"onnxruntime does not take the fused kernels: {_first_line(exc)}") from exc


def _info(node: Any) -> TensorInfo:
    if node.type not in _TYPES:
        raise ArtifactError(f"{node.name!r} is a {node.type}; expected one of {', '.join(_TYPES)}")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorInfo(name=node.name, dtype=np.dtype(_TYPES[node.type]), shape=shape)


def _first_line(exc: Exception) -> str:
    text = str(exc).strip().splitlines()[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
