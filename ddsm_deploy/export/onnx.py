"""A checkpoint to a deployable ONNX file: exported, recorded, checked, run, and compared with torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from pathlib import Path

import onnx
import onnx.checker

from ddsm_deploy.bundlefile import check_file_name
from ddsm_deploy.errors import ConfigError, GateError
from ddsm_deploy.export.fp16 import GRIDS, to_fp16
from ddsm_deploy.export.graph import DYNAMIC, OPSET, halve_weights, trace
from ddsm_deploy.export.onnxgraph import set_metadata
from ddsm_deploy.export.sampling import SAMPLINGS
from ddsm_deploy.export.verify import compare, find_images, load_images, require_onnxruntime, synthetic_images
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.model.checkpoint import load_checkpoint
from ddsm_deploy.model.deploy import DeployModule, ordered_outputs
from ddsm_deploy.parity import ParityBudget, ParityResult
from ddsm_deploy.spec import CHANNEL_ORDERS, METADATA_KEY, ModelSpec, sha256_of

WEIGHTS = ("fp32", "fp16")

MIN_SIZE = 32
"""The top level of the pyramid has stride 32: below this it would hold no pixel."""

PRECISIONS = ("fp32", "fp16")

BUDGETS = {"fp32": ParityBudget(changed=0.1), "fp16": ParityBudget(changed=1.0)}
"""How far file and torch may be apart; rounding alone moves pixels whose two best classes tie."""

MIN_HALF_SHARE = 0.5
"""Of the weights, at ``weights="fp16"``: a checkpoint saved with ``half=True`` has nearly all, another next to none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        size: height and width of the input, pixels, at least 32; None takes the checkpoint's.
        dynamic: ``none`` (one image of one size), ``batch`` (any number of images), or ``batch,size`` (any size too).
        sampling: ``portable`` (GridSample), ``fused`` (one node of our own with a body of GridSample, for runtimes with
            our kernel), or ``gather`` (for runtimes without a right GridSample).
        outputs: any of ``mask``, ``logits``, ``confidence``; the mask is always there.
        channel_order: of the input, ``bgr`` (OpenCV's) or ``rgb``.
        precision: of the graph's arithmetic, ``fp32`` or ``fp16`` (for GPUs; see `fp16.to_fp16`).
        grid: type in which GridSample runs in an fp16 graph, ``fp32`` or ``fp16``; not for fused sampling, which
            computes in float32.
        weights: how an fp32 graph stores them, ``fp32`` or ``fp16``; its arithmetic is float32 either way.
        verify: compare the file with torch in the end.
        images: files or folders to compare on; none means synthetic images.
    """

    size: tuple[int, int] | None = None
    dynamic: str = "none"
    sampling: str = "portable"
    outputs: tuple[str, ...] = ("mask",)
    channel_order: str = "bgr"
    precision: str = "fp32"
    grid: str = "fp32"
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
            "precision": PRECISIONS,
            "grid": GRIDS,
            "weights": WEIGHTS,
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                name = field.replace("_", " ")
                raise ConfigError(f"{name} is {getattr(self, field)!r}; expected one of: {' | '.join(allowed)}")
        if self.precision == "fp16" and self.weights == "fp16":
            raise ConfigError("an fp16 graph stores its weights as float16 anyway; leave the weights at fp32")
        if self.precision == "fp32" and self.grid != "fp32":
            raise ConfigError("the grid's type can be chosen in an fp16 graph alone; ask for precision fp16 too")
        if self.sampling == "fused" and self.grid != "fp32":
            raise ConfigError(
                "fused sampling computes in float32; leave the grid at fp32, or ask for sampling portable"
            )
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
    parity: ParityResult | None
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
        GateError: file and torch are further apart than `BUDGETS` allows.
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

    check_file_name(output, ".onnx")
    with replacing(output, sources=[checkpoint]) as temporary:
        size = (spec.height, spec.width)
        model = trace(module, size, dynamic=options.dynamic, sampling=options.sampling, outputs=options.outputs)
        half_share = _halved(model, checkpoint) if options.weights == "fp16" else 0.0
        if options.precision == "fp16":
            model = to_fp16(model, grid=options.grid)
        set_metadata(model, {METADATA_KEY: spec.to_json()})
        onnx.checker.check_model(model, full_check=True)
        _write(model, temporary, output)
        parity = None
        if options.verify:
            images = load_images(paths, spec) if paths else synthetic_images(*size)
            parity = compare(
                temporary,
                module,
                images,
                classes=spec.classes,
                dynamic=options.dynamic,
                budget=BUDGETS[options.precision],
            )
            if not parity:
                raise GateError(
                    f"{output}: not written, for it is not what torch gives on {parity.images} images: "
                    f"{'; '.join(parity.failures)}"
                )
            spec = spec.with_provenance(**parity.facts())
            set_metadata(model, {METADATA_KEY: spec.to_json()})
            _write(model, temporary, output)
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
        height=height, width=width, channel_order=options.channel_order, precision=options.precision
    ).with_provenance(
        source=checkpoint.name,
        source_sha256=sha256_of(checkpoint),
        opset=str(OPSET),
        sampling=options.sampling,
        dynamic=options.dynamic,
        weights="fp16" if options.precision == "fp16" else options.weights,
        **({"grid": options.grid} if options.precision == "fp16" else {}),
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


def _write(model: onnx.ModelProto, temporary: Path, output: Path) -> None:
    with writing(output):
        temporary.write_bytes(model.SerializeToString(deterministic=True))
