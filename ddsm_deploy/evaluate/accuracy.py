"""Accuracy of a deployed model on a labelled data set: what it gives as masks, compared at the labels' own size."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.datasets import Dataset
from ddsm_deploy.engines import in_words
from ddsm_deploy.errors import InputError
from ddsm_deploy.evaluate.metrics import BOUNDARY_TOLERANCE, BoundaryScore, ConfusionMatrix, Fractions
from ddsm_deploy.images import Image, Labels, read_image
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.runtime.segmenter import Segmenter

_READERS = 2
_AHEAD = 4  # pairs decoded before they are needed: bounds the memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Accuracy over one split. All scores are percentages, 0..100.

    Attributes:
        model: its name.
        sha256: of the file that ran (see `onnxweights.model_sha256`); None where a caller made the segmenter's engine.
        backend: what ran it.
        precision: what really ran.
        sampling: likewise; see `ddsm_deploy.engines.Engine`.
        choice: who chose the backend, and why.
        dataset: kind of data set.
        split: the part of it.
        images: how many.
        miou: mean IoU over the classes that appear in truth or prediction, from one confusion matrix over the split.
        pixel_accuracy: share of the labelled pixels whose class is right.
        boundary_f: mean over classes of the boundary F-score (see `metrics.BoundaryScore`); NaN without any boundary.
        boundary_tolerance_px: its tolerance, pixels of the label map.
        per_class: name -> IoU, in the data set's order; NaN for a class in neither truth nor prediction.
        boundary_f_per_class: name -> boundary F-score; NaN for a class without a boundary.
        pixels: labelled pixels compared.
    """

    model: str
    sha256: str | None
    backend: str
    precision: str
    sampling: str
    choice: str
    dataset: str
    split: str
    images: int
    miou: float
    pixel_accuracy: float
    boundary_f: float
    boundary_tolerance_px: int
    per_class: Mapping[str, float]
    boundary_f_per_class: Mapping[str, float]
    pixels: int

    @property
    def label(self) -> str:
        """What ran: backend, precision and sampling in words."""
        return in_words(self.backend, self.precision, self.sampling)

    def to_json(self) -> str:
        """The result as JSON text; null for NaN."""
        return json.dumps(self.fields(), indent=2, ensure_ascii=False)

    def fields(self) -> dict[str, Any]:
        """The result as plain values; None for NaN."""
        return without_nan(dataclasses.asdict(self))


def evaluate(
    segmenter: Segmenter,
    dataset: Dataset,
    *,
    boundary_tolerance: int = BOUNDARY_TOLERANCE,
    progress: Callable[[int, int], None] | None = None,
) -> EvalResult:
    """Runs a model over a split and scores its masks.

    The mask has the image's size; where the label map has another, the mask is brought to that by nearest neighbour.
    Classes are matched by name, so a model and a data set may number them differently.

    Args:
        segmenter: the model on a backend.
        dataset: images and labels.
        boundary_tolerance: of the boundary F-score, pixels of the label map.
        progress: called after each image with the number done and the number of all.

    Raises:
        ConfigError: the tolerance is out of range.
        InputError: model and data set have different classes, an image or label map is unreadable, one lies on
            its side, or no pixel has a label. Nothing is skipped.
    """
    names, count = dataset.classes.names, len(dataset.samples)
    to_dataset = match_classes(segmenter.spec.classes, names)
    confusion = ConfusionMatrix(len(names))
    boundaries = BoundaryScore(len(names), tolerance=boundary_tolerance)
    for done, (image, truth) in enumerate(_read_ahead(dataset), start=1):
        check_turned(dataset.samples[done - 1].labels, truth, image)
        mask = at_size(to_dataset[segmenter.predict(image).mask], truth.shape)
        confusion.update(truth, mask)
        boundaries.update(truth, mask)
        if progress:
            progress(done, count)
    pixels = int(confusion.counts.sum())
    if not pixels:
        raise InputError(
            f"no pixel of split {dataset.split!r} of this {dataset.name} data set has a label to compare with"
        )
    return EvalResult(
        model=segmenter.spec.name,
        sha256=model_sha256(segmenter.file) if segmenter.file else None,
        backend=segmenter.backend,
        precision=segmenter.precision,
        sampling=segmenter.sampling,
        choice=segmenter.choice,
        dataset=dataset.name,
        split=dataset.split,
        images=count,
        miou=100 * confusion.miou(),
        pixel_accuracy=100 * confusion.pixel_accuracy(),
        boundary_f=100 * boundaries.score(),
        boundary_tolerance_px=boundary_tolerance,
        per_class=_by_name(names, confusion.iou()),
        boundary_f_per_class=_by_name(names, boundaries.f_scores()),
        pixels=pixels,
    )


def _read_ahead(dataset: Dataset) -> Iterator[tuple[Image, Labels]]:
    """The pairs in order, the next few decoded in threads while the caller works."""

    def read(index: int) -> tuple[Image, Labels]:
        return read_image(dataset.samples[index].image), dataset.labels(index)

    count = len(dataset.samples)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        pending = collections.deque(pool.submit(read, index) for index in range(min(_AHEAD, count)))
        for index in range(count):
            pair = pending.popleft().result()
            if index + _AHEAD < count:
                pending.append(pool.submit(read, index + _AHEAD))
            yield pair


def match_classes(model: Sequence[str], data: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Table from the model's class ids to the data set's, by name.

    Raises:
        InputError: they have different classes, or two of one name.
    """
    for sign, names in (("the model", model), ("the data set", data)):
        if len(set(names)) != len(names):
            raise InputError(f"{sign} has two classes of one name: {_some(sorted(names))}")
    only_model, only_data = sorted(set(model) - set(data)), sorted(set(data) - set(model))
    if only_model or only_data:
        raise InputError(
            f"the model's {len(model)} classes are not the data set's {len(data)}: "
            f"only the model has {_some(only_model)}; only the data set has {_some(only_data)}"
        )
    return np.array([data.index(name) for name in model], dtype=np.uint8)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6]) or "none"
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown


def at_size(mask: Labels, size: tuple[int, ...]) -> Labels:
    """The mask at another height and width, by nearest neighbour."""
    if mask.shape == size:
        return mask
    return np.asarray(cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT), dtype=np.uint8)


def check_turned(path: Path, labels: Labels, image: Image) -> None:
    """Refuses labels that lie on their side, as where a note in the image's EXIF data turns that alone.

    Args:
        path: of either, for the message.
        labels: H×W.
        image: H×W×3.

    Raises:
        InputError: the labels have the shape of the image turned by 90°, and not its own, at whatever scale.
    """
    (height, width), (tall, wide) = labels.shape, image.shape[:2]
    rounding = max(tall + wide, height + width)  # a pixel each way
    if abs(height * wide - width * tall) > rounding >= abs(height * tall - width * wide):
        raise InputError(
            f"{path}: labels are {height}x{width}, but the image is {tall}x{wide}; expected labels that lie as it does "
            "(a note in its EXIF data may turn it)"
        )


def _by_name(names: Sequence[str], values: Fractions) -> dict[str, float]:
    return {name: 100 * float(value) for name, value in zip(names, values, strict=True)}


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, mappings among them included, with None for NaN, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return without_nan(value)
        return None if isinstance(value, float) and math.isnan(value) else value

    return {key: plain(value) for key, value in values.items()}
