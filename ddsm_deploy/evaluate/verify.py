"""Two ways of running a model, compared frame by frame: two backends, two precisions, or two files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ddsm_deploy.datasets import IGNORE, open_dataset
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.evaluate.accuracy import at_size, check_turned, match_classes
from ddsm_deploy.evaluate.layers import LayersOptions, LayersResult, check_layers, compare_layers, written_precision
from ddsm_deploy.evaluate.pair import Model, Pair, Side, describe
from ddsm_deploy.evaluate.pictures import Comparison, check_picture_name, draw_comparison, write_picture
from ddsm_deploy.files import check_writable
from ddsm_deploy.frames import Frame, FrameList, frames_in, frames_of
from ddsm_deploy.images import read_image
from ddsm_deploy.parity import BOUNDARY, ParityBudget, ParityMeter, ParityResult

MAX_CHANGED = {"fp32": 0.1, "fp16": 1.0, "bf16": 1.0, "int8": 5.0, "int8+fp16": 5.0, "int8+bf16": 5.0}
"""Per cent of the pixels that may change class where nobody says otherwise; the coarser precision of the two counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What to compare on, and how far apart A and B may be.

    Attributes:
        data: a folder of images (searched recursively) or one image; with `dataset`, the data set's root.
        dataset: ``camvid``, ``cityscapes`` or ``folder``, to have labels; None means images alone.
        split: the part of the data set.
        images: compare on so many, evenly spaced; None is all of them.
        backend_a: what runs A; None is the default of `Side`.
        backend_b: likewise for B.
        precision_a: what A must run at; None is its own.
        precision_b: likewise for B.
        sampling_a: how A must sample, ``fused`` or ``portable``; None is fused where it can be had.
        sampling_b: likewise for B.
        provider_a: of onnxruntime where it runs A: ``cpu``, ``cuda`` or ``tensorrt``.
        provider_b: likewise for B.
        threads: threads of one inference.
        max_changed: most per cent of the pixels (0..100) whose class may differ; None takes it from `MAX_CHANGED`.
        max_miou_drop: most points that B's mIoU may lie below A's; needs `dataset`.
        max_logit_error: largest absolute difference of a logit; needs models that give logits.
        boundary: reach of a class boundary, pixels (see `parity.ParityMeter`).
        keep_worst: how many of the worst frames to name and to draw.
        picture: PNG file to draw the worst frames into; None draws none.
        layers: how to look for the first layer at which A and B part; None does not look.
    """

    data: Path
    dataset: str | None = None
    split: str = "val"
    images: int | None = None
    backend_a: str | None = None
    backend_b: str | None = None
    precision_a: str | None = None
    precision_b: str | None = None
    sampling_a: str | None = None
    sampling_b: str | None = None
    provider_a: str = "cpu"
    provider_b: str = "cpu"
    threads: int | None = None
    max_changed: float | None = None
    max_miou_drop: float | None = None
    max_logit_error: float | None = None
    boundary: int = BOUNDARY
    keep_worst: int = 4
    picture: Path | None = None
    layers: LayersOptions | None = None

    def __post_init__(self) -> None:
        if self.picture is not None:
            check_picture_name(self.picture)
        if self.images is not None and self.images < 1:
            raise ConfigError(
                f"images is {self.images}; expected at least 1, a comparison of nothing would always pass"
            )
        if self.max_miou_drop is not None and self.dataset is None:
            raise ConfigError("a limit for the mIoU needs labels; name the kind of data set too (--dataset)")
        self.budget("fp32", "fp32")  # says now what is wrong with a limit

    def budget(self, *precisions: str) -> ParityBudget:
        """The budget, where one that nobody stated follows from the precisions compared."""
        changed = max(MAX_CHANGED[p] for p in precisions) if self.max_changed is None else self.max_changed
        return ParityBudget(changed=changed, miou_drop=self.max_miou_drop, logit_error=self.max_logit_error)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class VerifyResult(ParityResult):
    """A `ParityResult` that knows what was compared.

    Attributes:
        a: A's file, backend, precision and sampling, in words.
        b: B's.
        layers: the comparison layer by layer on the worst frames, where it was asked for. It has no part in the
            verdict: a layer may differ and the classes be the same.
    """

    a: str
    b: str
    layers: LayersResult | None = None

    def fields(self) -> dict[str, Any]:
        """See `ParityResult.fields`."""
        return {**super().fields(), "layers": None if self.layers is None else self.layers.fields()}


def verify(
    a: Model = None,
    b: Model = None,
    options: VerifyOptions | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> VerifyResult:
    """Runs A and B on the same frames and compares the class of each pixel, at the labels' size or else the image's.

    Args:
        a: the reference: a file, a bundle, a shipped model's name; None is the default shipped model.
        b: what is judged; None is the same model as A, on another backend or at another precision.
        options: the data and the budget.
        progress: called after each frame with what is done, the number done and the number of all.

    Returns:
        A result that is true if, and only if, the budget holds.

    Raises:
        ConfigError: an option is wrong, A and B are one and the same run, or a limit is set that can't be measured.
        InputError: no frames, one is unreadable, or the two models have other classes or sizes.
        ArtifactError: a model is missing or damaged.
        BackendError: a backend is missing or can't do what was asked.
    """
    options = _given(options)
    if options.picture is not None:
        check_writable(options.picture)
    frames = find_frames(options)
    by_name = {frame.name: frame for frame in frames}

    def step(text: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(text, done, total) if progress else None

    sides = (
        Side(
            model=a,
            backend=options.backend_a,
            precision=options.precision_a,
            sampling=options.sampling_a,
            provider=options.provider_a,
        ),
        Side(
            model=a if b is None else b,
            backend=options.backend_b,
            precision=options.precision_b,
            sampling=options.sampling_b,
            provider=options.provider_b,
        ),
    )
    with Pair(*sides, threads=options.threads) as pair:
        if options.layers is not None:
            check_layers(pair.a, pair.b)  # before the work, not after it
        result = compare_pair(pair, frames, options, progress=step("frames"))
        worst = [by_name[name] for name, _ in result.worst]
        if options.picture is not None:
            rows = [_comparison(pair, frame, frames.classes) for frame in worst]
            write_picture(options.picture, draw_comparison(rows, a=result.a, b=result.b))
        if options.layers is not None:
            images = [(frame.name, read_image(frame.path)) for frame in worst[: options.layers.frames]]
            layers = compare_layers(
                pair.a, pair.b, images, options.layers, threads=options.threads, progress=step("layers")
            )
            result = dataclasses.replace(result, layers=layers)
    return result


def compare_pair(
    pair: Pair,
    frames: FrameList,
    options: VerifyOptions,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyResult:
    """`verify` for a pair that is open already."""
    if options.max_logit_error is not None and not all("logits" in s.outputs for s in (pair.a, pair.b)):
        lacking = " and ".join(describe(s) for s in (pair.a, pair.b) if "logits" not in s.outputs)
        raise ConfigError(
            f"a limit for logits needs models that give them, and {lacking} does not; export with --logits"
        )
    classes = pair.a.spec.classes
    to_model = truth_table(classes, frames.classes)
    meter = ParityMeter(classes, boundary=options.boundary, keep_worst=options.keep_worst)
    for done, frame in enumerate(frames, start=1):
        image = read_image(frame.path)
        first, second, logits = pair.predict(image)
        truth = None if frame.labels is None else to_model[frame.labels()]
        if truth is not None:
            check_turned(frame.path, truth, image)
        size = first.mask.shape if truth is None else truth.shape
        masks = (at_size(segmentation.mask, size) for segmentation in (first, second))
        meter.update(*masks, truth=truth, logits=logits, name=frame.name)
        if progress:
            progress(done, len(frames))
    written = [written_precision(s.file) if s.file else s.spec.precision for s in (pair.a, pair.b)]
    result = meter.result(options.budget(pair.a.precision, pair.b.precision, *written))
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return VerifyResult(**fields, a=pair.names[0], b=pair.names[1])


def find_frames(options: VerifyOptions) -> FrameList:
    """The frames to compare on, in the order of their paths.

    Raises:
        ConfigError: an unknown kind of data set.
        InputError: there is nothing to compare on.
    """
    if options.dataset is not None:
        frames = frames_of(open_dataset(options.dataset, options.data, options.split), options.data)
    else:
        frames = frames_in(options.data)
    return frames if options.images is None else frames.spread(options.images)


def truth_table(classes: tuple[str, ...], data_classes: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Table from a data set's class ids, and `IGNORE`, to the model's, by name: 256 entries.

    Args:
        classes: the model's.
        data_classes: the data set's; none without labels, and the table is of no use then.

    Raises:
        InputError: they have different classes.
    """
    table = np.full(256, IGNORE, np.uint8)
    if data_classes:
        table[match_classes(classes, data_classes)] = np.arange(len(classes), dtype=np.uint8)
    return table


def _comparison(pair: Pair, frame: Frame, classes: tuple[str, ...]) -> Comparison:
    image = read_image(frame.path)
    first, second, _ = pair.predict(image)
    truth = None if frame.labels is None else truth_table(first.classes, classes)[frame.labels()]
    size = first.mask.shape if truth is None else truth.shape
    first, second = (dataclasses.replace(s, mask=at_size(s.mask, size)) for s in (first, second))
    return Comparison(name=frame.name, image=image, a=first, b=second, truth=truth)


def _given(options: VerifyOptions | None) -> VerifyOptions:
    if options is None:
        raise ConfigError("nothing to compare on; give VerifyOptions(data=...)")
    return options
