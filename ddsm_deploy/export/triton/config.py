"""Triton's model configuration, made by its own protobuf schema.

Source: the schema, github.com/triton-inference-server/common, protobuf/model_config.proto; what the ONNX Runtime
backend reads of it, github.com/triton-inference-server/onnxruntime_backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from ddsm_deploy.endpoint import NAME, SAMPLING_KEY, SPEC_KEY
from ddsm_deploy.enginefile import TensorRecord
from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.spec import PRECISIONS, ModelSpec

PLATFORMS = {"onnxruntime": ("onnxruntime_onnx", "model.onnx"), "tensorrt": ("tensorrt_plan", "model.plan")}
"""Triton's backends -> its word for what they run, and the file's name there."""

DEVICES = ("cpu", "gpu")
SHA256_KEY = "ddsm.sha256"

_TYPES = {"uint8": "TYPE_UINT8", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
_ACCELERATOR_MODES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How a model is deployed.

    Attributes:
        platform: which of Triton's backends runs it, of `PLATFORMS`.
        name: of the model on the server; None is the model's own.
        max_batch: most images of one inference; less where the model takes fewer.
        batch_delay_us: how long a request waits for others to be batched with, microseconds.
        instances: of the model on each device.
        device: ``cpu`` or ``gpu``; None is the CPU, for tensorrt the GPU.
        precision: of the file to deploy; None is the model's own.
        threads: onnxruntime on the CPU: of one inference; None leaves it to the runtime, which takes every core.
        accelerator: onnxruntime on the GPU: ``tensorrt`` puts what it can on ONNX Runtime's TensorRT provider.
        overwrite: replace a model of that name, all its versions.
        new_version: add a version to it.
    """

    platform: str = "onnxruntime"
    name: str | None = None
    max_batch: int = 8
    batch_delay_us: int = 2000
    instances: int = 1
    device: str | None = None
    precision: str | None = None
    threads: int | None = None
    accelerator: str | None = None
    overwrite: bool = False
    new_version: bool = False

    def __post_init__(self) -> None:
        for field, allowed in (
            ("platform", tuple(PLATFORMS)),
            ("device", (None, *DEVICES)),
            ("precision", (None, *PRECISIONS)),
            ("accelerator", (None, "tensorrt")),
        ):
            if getattr(self, field) not in allowed:
                words = " or ".join(word for word in allowed if word)
                raise ConfigError(f"{field} is {getattr(self, field)!r}; expected {words}")
        for field, least in (("max_batch", 1), ("batch_delay_us", 0), ("instances", 1), ("threads", 1)):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{field.replace('_', ' ')} is {value!r}; expected an integer of at least {least}")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ConfigError(f"name is {self.name!r}; expected letters, digits, '_', '.' and '-', no more than 128")
        if self.platform == "tensorrt" and self.device == "cpu":
            raise ConfigError("tensorrt runs on GPUs alone; leave out --device cpu, or take --platform onnxruntime")
        if self.accelerator and (self.platform, self.device) != ("onnxruntime", "gpu"):
            raise ConfigError("an accelerator is for --platform onnxruntime --device gpu")
        if self.threads and (self.platform, self.device or "cpu") != ("onnxruntime", "cpu"):
            raise ConfigError("threads are for --platform onnxruntime --device cpu")
        if self.overwrite and self.new_version:
            raise ConfigError("overwrite and new version exclude each other; say which")

    @property
    def runs_on(self) -> str:
        """The device, chosen where it was left open."""
        return self.device or ("gpu" if self.platform == "tensorrt" else "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """A file that Triton can run, as far as its configuration must tell.

    Attributes:
        file: the file.
        sha256: which model it is (see `onnxweights.model_sha256`).
        spec: of the model.
        sampling: how it samples on the server.
        inputs: names, types and shapes, -1 for an open axis; the first axis is the batch.
        outputs: likewise.
        most: images that it takes at once; None where there is no limit, 0 where the batch is fixed.
        example: height and width at which it can be run.
        notes: what a user should know, a sentence each.
    """

    file: Path
    sha256: str
    spec: ModelSpec
    sampling: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    most: int | None
    example: tuple[int, int]
    notes: tuple[str, ...] = ()


def model_config(name: str, served: Served, options: TritonOptions) -> ModelConfig:
    """The configuration of a served file.

    Raises:
        ArtifactError: a tensor's type is none of those that a deployed model has.
        ConfigError: the accelerator can't be told the file's precision.
    """
    platform, file = PLATFORMS[options.platform]
    batch = options.max_batch if served.most is None else min(options.max_batch, served.most)
    config = ModelConfig(
        name=name, platform=platform, backend=options.platform, max_batch_size=batch, default_model_filename=file
    )
    _add_tensors(config.input, served.inputs, batched=batch > 0)
    _add_tensors(config.output, served.outputs, batched=batch > 0)
    kind = ModelInstanceGroup.KIND_GPU if options.runs_on == "gpu" else ModelInstanceGroup.KIND_CPU
    config.instance_group.add(count=options.instances, kind=kind)
    if batch > 1:
        config.dynamic_batching.max_queue_delay_microseconds = options.batch_delay_us
    for size in sorted({1, max(batch, 1)}):  # a batch of one and the largest: runtimes prepare for each shape
        _add_warm_up(config, served, size, batched=batch > 0)
    texts = {SPEC_KEY: served.spec.to_json(), SAMPLING_KEY: served.sampling, SHA256_KEY: served.sha256}
    if options.threads is not None:
        texts["intra_op_thread_count"] = str(options.threads)
    for key, text in texts.items():
        config.parameters[key].string_value = text
    if options.accelerator:
        _add_accelerator(config, served, options.accelerator)
    return config


def config_text(config: ModelConfig) -> str:
    """A configuration as ``config.pbtxt`` holds it."""
    text: str = text_format.MessageToString(config, as_utf8=True)
    return text


def read_config(path: Path) -> ModelConfig:
    """Reads a ``config.pbtxt``.

    Raises:
        ArtifactError: missing, or not by the schema.
    """
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), ModelConfig())
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    except (text_format.ParseError, ValueError) as exc:
        raise ArtifactError(f"{path}: no configuration of Triton's ({' '.join(str(exc).split())})") from exc


def _add_tensors(field: Any, tensors: Sequence[TensorRecord], *, batched: bool) -> None:
    for tensor in tensors:
        if tensor.dtype not in _TYPES:
            raise ArtifactError(f"{tensor.name!r} is {tensor.dtype}; expected one of {', '.join(_TYPES)}")
        # what may be batched has its first axis from max_batch_size
        field.add(name=tensor.name, data_type=_TYPES[tensor.dtype], dims=tensor.shape[1:] if batched else tensor.shape)


def _add_warm_up(config: ModelConfig, served: Served, size: int, *, batched: bool) -> None:
    warm_up = config.model_warmup.add(name=f"zeros_{size}", batch_size=size)
    for tensor in served.inputs:
        dims = [*([] if batched else [tensor.shape[0]]), *served.example, tensor.shape[3]]
        feed = warm_up.inputs[tensor.name]
        feed.data_type, feed.zero_data = _TYPES[tensor.dtype], True
        feed.dims.extend(dims)


def _add_accelerator(config: ModelConfig, served: Served, name: str) -> None:
    if served.spec.precision not in _ACCELERATOR_MODES:
        raise ConfigError(
            f"the {name} accelerator runs {', '.join(_ACCELERATOR_MODES)}, and {served.file.name} is "
            f"{served.spec.precision}; build an engine of it and take --platform tensorrt"
        )
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name=name)
    accelerator.parameters["precision_mode"] = _ACCELERATOR_MODES[served.spec.precision]
