"""The first layer at which two runs of one graph part.

Both runs are repeated with the graph's inner tensors as outputs, some at a time so that memory stays bounded, and each
tensor that both files have is compared by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import Engine, EngineOptions, open_engine
from ddsm_deploy.errors import BackendMissing, ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.segmenter import Segmenter

if TYPE_CHECKING:
    from ddsm_deploy.export.probe import Graph, Tensor

Array = npt.NDArray[Any]

NOISE_FLOORS = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 4e-1, "int8": 9e-1, "int8+fp16": 9e-1, "int8+bf16": 9e-1}
"""Relative error that rounding alone may explain: two to three times the largest that right files of `ddsm-lite0-large`
show (fp32 far more, for another order of summing is all that may differ there)."""

PIECE = 1 << 27
"""Bytes of inner tensors that one run hands out at most; two runs are held side by side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersOptions:
    """How layers are compared.

    Attributes:
        noise_floor: relative error above which a layer counts as parted; None takes it from `NOISE_FLOORS`.
        frames: so many of the worst frames are looked at.
        piece: bytes of inner tensors that one run hands out at most.
    """

    noise_floor: float | None = None
    frames: int = 1
    piece: int = PIECE

    def __post_init__(self) -> None:
        if self.noise_floor is not None and not 0 < self.noise_floor < math.inf:
            raise ConfigError(f"noise floor is {self.noise_floor}; expected a relative error above 0, such as 1e-3")
        for name in ("frames", "piece"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One tensor inside the graph.

    Attributes:
        tensor: its name.
        node: of A's node that makes it.
        op_type: that node's operator.
        error: root mean square of B - A, relative to that of A; infinite where a number is not finite or shapes differ.
        error_before: the largest such error among the tensors from which that node computes it; 0 where there is none.
    """

    tensor: str
    node: str
    op_type: str
    error: float
    error_before: float

    @property
    def jump(self) -> float:
        """What the node added: `error` less `error_before`."""
        return self.error - self.error_before if math.isfinite(self.error_before) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersResult:
    """The comparison, layer by layer. It is true if, and only if, no layer leaves the noise floor.

    Attributes:
        layers: every tensor compared, in A's order.
        noise_floor: relative error above which a layer counts as parted.
        frames: names of the frames looked at.
        unseen: tensors of A that could not be compared: B has none of that name, or a runtime renames it.
    """

    layers: tuple[Layer, ...]
    noise_floor: float
    frames: tuple[str, ...]
    unseen: int

    def __bool__(self) -> bool:
        return self.first is None

    @property
    def first(self) -> Layer | None:
        """The first layer that leaves the noise floor."""
        return next((layer for layer in self.layers if not layer.error <= self.noise_floor), None)

    def jumps(self, most: int = 10) -> list[Layer]:
        """The layers that add most to the error, in the graph's order."""
        worst = sorted(range(len(self.layers)), key=lambda index: -self.layers[index].jump)[:most]
        return [self.layers[index] for index in sorted(worst)]

    def sentence(self) -> str:
        """What was found, in one sentence."""
        count = f"{len(self.layers)} tensors compared"
        if self.unseen:
            count += f" ({self.unseen} more have no counterpart)"
        if self.first is None:
            worst = max(self.layers, key=lambda layer: layer.error)
            return f"no layer leaves the noise floor of {self.noise_floor:g}: {worst.error:.1e} at most; {count}"
        first = self.first
        return (
            f"the runs part at {first.node} ({first.op_type}), which makes {first.tensor}: its error is "
            f"{first.error:.1e} of the tensor's own scale, {first.error_before:.1e} before it, noise floor "
            f"{self.noise_floor:g}; {count}"
        )

    def fields(self) -> dict[str, Any]:
        """The result as plain values; None for an infinite error."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        for layer in layers:
            for key in ("error", "error_before"):
                layer[key] = layer[key] if math.isfinite(layer[key]) else None
        first = None if self.first is None else self.first.tensor
        return {**dataclasses.asdict(self), "layers": layers, "frames": list(self.frames), "first": first}


def compare_layers(
    a: Segmenter,
    b: Segmenter,
    images: Sequence[tuple[str, Image]],
    options: LayersOptions | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LayersResult:
    """Compares the inner tensors of two open models.

    Args:
        a: the reference.
        b: what is judged.
        images: names and images to run on, uint8 H×W×3, BGR, at least one.
        options: see `LayersOptions`.
        threads: of one inference.
        progress: called after each piece with the number of tensors done and of all.

    Raises:
        ConfigError: no image, or a model that runs from something else than an ONNX file.
        InputError: the two files have no inner tensor in common.
        BackendMissing: the package onnx is not installed.
        BackendError: a runtime can't run the file with its inner tensors as outputs.
    """
    options = options or LayersOptions()
    if not images:
        raise ConfigError("no image to compare layers on")
    probe = _probe()
    paths = check_layers(a, b)
    models = [probe.load(path) for path in paths]
    shape = a.prepare(images[0][1]).shape
    tensors = probe.watchable(models[0], shape)
    others = {tensor.name for tensor in probe.watchable(models[1], shape)}
    common = [tensor for tensor in tensors if tensor.name in others]
    if not common:
        raise InputError(
            f"{paths[0].name} and {paths[1].name} have no inner tensor of one name; were both made from one?"
        )
    errors: dict[str, float] = {}
    done = 0
    for piece in probe.in_pieces(common, options.piece):
        errors.update(_errors((a, b), models, piece, [image for _, image in images], threads))
        done += len(piece)
        if progress:
            progress(done, len(common))
    floor = options.noise_floor
    if floor is None:
        floor = max(NOISE_FLOORS[p] for p in (a.precision, b.precision, *map(written_precision, paths)))
    layers = [_layer(tensor, errors) for tensor in common if tensor.name in errors]
    names = tuple(name for name, _ in images)
    return LayersResult(layers=tuple(layers), noise_floor=floor, frames=names, unseen=len(tensors) - len(layers))


def _layer(tensor: Tensor, errors: dict[str, float]) -> Layer:
    before = max((errors.get(name, 0.0) for name in tensor.feeds), default=0.0)
    return Layer(
        tensor=tensor.name,
        node=tensor.node,
        op_type=tensor.op_type,
        error=errors[tensor.name],
        error_before=before,
    )


def _errors(
    pair: tuple[Segmenter, Segmenter],
    models: Sequence[Graph],
    piece: Sequence[Tensor],
    images: Sequence[Image],
    threads: int | None,
) -> dict[str, float]:
    """Relative error of each tensor of a piece, over all images together."""
    sums: dict[str, tuple[float, float]] = {}
    names, shape = [tensor.name for tensor in piece], pair[0].prepare(images[0]).shape
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ddsm-layers-")))
        engines = []
        for side, (segmenter, model) in enumerate(zip(pair, models, strict=True)):
            path = folder / f"{'ab'[side]}.onnx"
            path.write_bytes(_probe().expose(model, names, shape).SerializeToString())
            engines.append(_engine(segmenter, path, threads))
            stack.callback(engines[-1].close)
        for image in images:
            first, second = (
                engine.run({engine.inputs[0].name: segmenter.prepare(image)})
                for engine, segmenter in zip(engines, pair, strict=True)
            )
            for name in names:
                if name in first and name in second:
                    error, scale = _squares(first.pop(name), second.pop(name))
                    before = sums.get(name, (0.0, 0.0))
                    sums[name] = (before[0] + error, before[1] + scale)
    return {name: _relative(*squares) for name, squares in sums.items()}


def _squares(a: Array, b: Array) -> tuple[float, float]:
    """Sums of the squares of B - A and of A."""
    if a.shape != b.shape:
        return math.inf, 1.0
    first, second = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        second -= first
        error, scale = float(second @ second), float(first @ first)
    return (error, scale) if math.isfinite(error) and math.isfinite(scale) else (math.inf, 1.0)


def _relative(error: float, scale: float) -> float:
    return 0.0 if error == 0 else math.sqrt(error / scale) if scale > 0 else math.inf


def _engine(segmenter: Segmenter, path: Path, threads: int | None) -> Engine:
    asked = segmenter.options or EngineOptions()
    options = EngineOptions(
        precision=segmenter.precision, threads=threads, sampling=asked.sampling, provider=asked.provider
    )
    return open_engine(resolve(path), segmenter.backend, options)


def written_precision(file: Path) -> str:
    """What a model file is written in, whatever a runtime makes of it."""
    return resolve(file).spec.precision


def check_layers(a: Segmenter, b: Segmenter) -> list[Path]:
    """The ONNX files that two models run.

    Raises:
        ConfigError: one of them runs something else.
    """
    files = []
    for segmenter in (a, b):
        file = segmenter.file
        if file is None or file.suffix.lower() != ".onnx":
            raise ConfigError(
                f"layers are compared between ONNX files, and {segmenter.backend} runs "
                f"{file.name if file else segmenter.spec.name}; compare onnxruntime and openvino, or two ONNX files"
            )
        files.append(file)
    return files


def _probe() -> Any:
    try:
        from ddsm_deploy.export import probe
    except ImportError as exc:
        raise BackendMissing("onnx", extra="quantize", why=f"comparing layers needs it: {exc}") from exc
    return probe
