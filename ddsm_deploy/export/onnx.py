"""A checkpoint to a deployable ONNX file: exported, recorded, checked, run, and compared with torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.checker

from ddsm_deploy.errors import ConfigError, GateError, InputError
from ddsm_deploy.export.graph import DYNAMIC, OPSET, halve_weights, set_metadata, trace
from ddsm_deploy.export.sampling import SAMPLINGS
from ddsm_deploy.export.verify import Parity, compare, find_images, load_images, require_onnxruntime, synthetic_images
from ddsm_deploy.model.checkpoint import load_checkpoint
from ddsm_deploy.model.deploy import DeployModule, ordered_outputs
from ddsm_deploy.spec import CHANNEL_ORDERS, METADATA_KEY, ModelSpec, sha256_of

WEIGHTS = ("fp32", "fp16")

MIN_SIZE = 32
"""The top level of the pyramid has stride 32: below this it would hold no pixel."""

MIN_AGREEMENT = 0.999
"""Least share of pixels on which file and torch must agree; rounding alone moves pixels whose two best classes tie."""

MIN_HALF_SHARE = 0.5
"""Of the weights, at ``weights="fp16"``: a checkpoint saved with ``half=True`` has nearly all, another next to none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        size: height and width of the input, pixels, at least 32; None takes the checkpoint's.
        dynamic: ``none`` (one image of one size), ``batch`` (any number of images), or ``batch,size`` (any size too).
        sampling: ``portable`` (GridSample) or ``gather`` (for runtimes without a right one).
        outputs: any of ``mask``, ``logits``, ``confidence``; the mask is always there.
        channel_order: of the input, ``bgr`` (OpenCV's) or ``rgb``.
        weights: how they are stored, ``fp32`` or ``fp16``; arithmetic is float32 either way.
        verify: compare the file with torch in the end.
        images: files or folders to compare on; none means synthetic images.
    """

    size: tuple[int, int] | None = None
    dynamic: str = "none"
    sampling: str = "portable"
    outputs: tuple[str, ...] = ("mask",)
    channel_order: str = "bgr"
    weights: str = "fp32"
    verify: bool = True
    images: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < MIN_SIZE:
            raise ConfigError(f"size is {self.size[0]}x{self.size[1]}; expected at least {MIN_SIZE}x{MIN_SIZE}")
        choices = {
            "dynamic": tuple(DYNAMIC),
            "sampling": SAMPLINGS,
            "channel_order": CHANNEL_ORDERS,
            "weights": WEIGHTS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                name = field.replace("_", " ")
                raise ConfigError(f"{name} is {getattr(self, field)!r}; expected one of: {' | '.join(allowed)}")
        if self.images and not self.verify:
            raise ConfigError("images to verify on were given, but verification is off; drop one of the two")
        object.__setattr__(self, "outputs", ordered_outputs(self.outputs))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: the file.
        bytes: its size.
        sha256: hex digest of it.
        spec: the record inside it.
        parity: comparison with torch; None where it was switched off.
        half_share: share of the weights that is stored as float16, 0..1.
        seconds: wall time of the whole export.
    """

    path: Path
    bytes: int
    sha256: str
    spec: ModelSpec
    parity: Parity | None
    half_share: float
    seconds: float


def export_onnx(checkpoint: str | Path, output: str | Path, options: ExportOptions | None = None) -> ExportReport:
    """Exports a checkpoint to an ONNX file (opset 19) with pre- and post-processing inside.

    Input ``image``: uint8 N×H×W×3. Outputs ``mask`` uint8 N×H×W (class ids), and if asked for ``logits`` float32
    N×K×H×W and ``confidence`` uint8 N×H×W (255 = 1). The same checkpoint and options give the same bytes. The file
    appears under its name only when it has passed.

    Raises:
        ArtifactError: the checkpoint is missing, damaged, or of another architecture.
        ConfigError: options that do not fit the checkpoint.
        InputError: the output can't be written, or an image can't be read.
        BackendMissing: verification is on, and ONNX Runtime is not installed.
        BackendError: torch can't export it, or ONNX Runtime can't run it.
        GateError: file and torch agree on fewer pixels than `MIN_AGREEMENT`.
    """
    started = time.perf_counter()
    options = options or ExportOptions()
    checkpoint, output = Path(checkpoint), Path(output)
    if options.verify:
        require_onnxruntime()
    paths = find_images(options.images)
    network, source = load_checkpoint(checkpoint)
    spec = _spec(source, checkpoint, options)
    module = DeployModule(network, spec, outputs=options.outputs).eval()

    with _replacing(output) as temporary:
        size = (spec.height, spec.width)
        model = trace(module, size, dynamic=options.dynamic, sampling=options.sampling, outputs=options.outputs)
        half_share = _halved(model, checkpoint) if options.weights == "fp16" else 0.0
        set_metadata(model, {METADATA_KEY: spec.to_json()})
        onnx.checker.check_model(model, full_check=True)
        with _writing(output):
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        parity = None
        if options.verify:
            images = load_images(paths, spec) if paths else synthetic_images(*size)
            parity = compare(temporary, module, images, dynamic=options.dynamic)
            if parity.agreement < MIN_AGREEMENT:
                raise GateError(
                    f"{output}: not written; it agrees with torch on {parity.agreement:.4%} of the pixels of "
                    f"{parity.images} images, expected at least {MIN_AGREEMENT:.1%}"
                )
        return ExportReport(
            path=output,
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
            spec=spec,
            parity=parity,
            half_share=half_share,
            seconds=time.perf_counter() - started,
        )


def _spec(source: ModelSpec, checkpoint: Path, options: ExportOptions) -> ModelSpec:
    """The record of the deployed model. Its provenance holds facts that are the same on every machine, and no paths."""
    height, width = options.size or (source.height, source.width)
    if min(height, width) < MIN_SIZE:
        raise ConfigError(f"the checkpoint's size is {height}x{width}; expected at least {MIN_SIZE}x{MIN_SIZE}")
    packages = ("ddsm-deploy", "torch", "onnx", "onnxscript")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return source.replace(
        height=height, width=width, channel_order=options.channel_order, precision="fp32"
    ).with_provenance(
        source=checkpoint.name,
        source_sha256=sha256_of(checkpoint),
        opset=str(OPSET),
        sampling=options.sampling,
        dynamic=options.dynamic,
        weights=options.weights,
        **{f"version.{name}": version for name, version in versions.items()},
    )


def _halved(model: onnx.ModelProto, checkpoint: Path) -> float:
    share = halve_weights(model)
    if share < MIN_HALF_SHARE:
        raise ConfigError(
            f"{checkpoint}: {1 - share:.0%} of its weights are not float16 numbers, and storing them as such would "
            "change them; save the checkpoint with half=True first, or export with --weights fp32"
        )
    return share


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A temporary file beside `output`, tried out for writing at once and renamed to it if the block ends well."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    if output.is_dir():
        raise InputError(f"{output}: is a folder; expected the name of a file such as model.onnx")
    with _writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    try:
        yield temporary
        with _writing(output):
            temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise InputError(f"{output}: can't be written ({exc.strerror or exc})") from exc
