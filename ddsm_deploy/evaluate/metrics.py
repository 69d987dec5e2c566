"""Segmentation metrics on label maps: confusion matrix (IoU, pixel accuracy) and the boundary F-score.

Both gather counts over a whole data set and divide once at the end, so large and small images, and classes that appear
in few of them, weigh by their pixels. All results are fractions, 0..1. Pixels whose truth is `IGNORE` take no part.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.datasets import IGNORE
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Labels
from ddsm_deploy.spec import MAX_CLASSES

Counts = npt.NDArray[np.int64]
Fractions = npt.NDArray[np.float64]

BOUNDARY_TOLERANCE = 3
"""Default tolerance of the boundary F-score, pixels of the label map: one number whatever the image's size."""


class ConfusionMatrix:
    """K×K pixel counts, ``counts[truth, prediction]``, int64: exact for any data set that fits on a disk.

    Args:
        classes: K, 1 to 255.
    """

    def __init__(self, classes: int) -> None:
        _check_classes(classes)
        self.counts: Counts = np.zeros((classes, classes), dtype=np.int64)

    def update(self, truth: Labels, prediction: Labels) -> None:
        """Adds one image's pixels; those whose truth is `IGNORE` are left out.

        Args:
            truth: uint8, H×W, class ids or `IGNORE`.
            prediction: uint8, H×W, class ids.

        Raises:
            InputError: the shapes or types differ from that, or a value is neither a class id nor, in truth, `IGNORE`.
        """
        classes = len(self.counts)
        _check_pair(truth, prediction, classes)
        pairs = truth.astype(np.uint16) * np.uint16(classes) + prediction  # at most 254 · 255 + 254, within uint16
        counted = np.bincount(pairs[truth != IGNORE], minlength=classes * classes)
        self.counts += counted.reshape(classes, classes)

    def iou(self) -> Fractions:
        """Intersection over union of each class, K values; NaN where a class is in neither truth nor prediction."""
        hits = np.diag(self.counts)
        return _ratio(hits, self.counts.sum(axis=0) + self.counts.sum(axis=1) - hits)

    def miou(self) -> float:
        """Mean IoU over the classes that appear in truth or prediction; the others are left out, not counted as 0 or 1.

        NaN where no pixel was counted.
        """
        return _mean(self.iou())

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels whose class is right; NaN where no pixel was counted."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))


class BoundaryScore:
    """Class-wise boundary F-score at a tolerance, counted over a data set.

    The boundary of a class in a map is every pixel of that class with a 4-neighbour of another class; the image's edge
    and void (`IGNORE` in the truth) make no boundary. A boundary pixel of the prediction is right if the truth has a
    boundary pixel of the same class within `tolerance` (Euclidean distance of pixel centres, inclusive), and a boundary
    pixel of the truth is found if the prediction has one. Pixels in void or within the tolerance of it are not counted
    on either side, because their counterpart may lie in the void; they still serve as the counterpart of others.

    Per class: precision = right / predicted, recall = found / true, both summed over all images, and
    F = 2·precision·recall / (precision + recall). The score is the mean of F over the classes that have a counted
    boundary pixel in truth or prediction.

    This is the contour measure of Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic
    segmentation?" (BMVC 2013) and of Perazzi et al. (CVPR 2016), but with counts summed over the data set where they
    average F over images, and a tolerance in pixels where they take 0.75 % of the diagonal (4.5 pixels at 360×480).

    Args:
        classes: K, 1 to 255.
        tolerance: pixels of the label map, 0 to 100.

    Raises:
        ConfigError: out of these ranges.
    """

    def __init__(self, classes: int, *, tolerance: int = BOUNDARY_TOLERANCE) -> None:
        _check_classes(classes)
        if not 0 <= tolerance <= 100:
            raise ConfigError(f"boundary tolerance is {tolerance} pixels; expected 0 to 100")
        self.tolerance = tolerance
        self._disc = _disc(tolerance)
        self.right: Counts = np.zeros(classes, dtype=np.int64)
        self.predicted: Counts = np.zeros(classes, dtype=np.int64)
        self.found: Counts = np.zeros(classes, dtype=np.int64)
        self.true: Counts = np.zeros(classes, dtype=np.int64)

    def update(self, truth: Labels, prediction: Labels) -> None:
        """Adds one image; arguments and errors as in `ConfusionMatrix.update`."""
        _check_pair(truth, prediction, len(self.true))
        void = truth == IGNORE
        counted = self._dilate(void) == 0
        true = np.where(_boundaries(truth, void), truth, IGNORE)
        predicted = np.where(_boundaries(prediction, void), prediction, IGNORE)
        for identity in np.union1d(true, predicted):
            if identity != IGNORE:
                self._count(identity, true == identity, predicted == identity, counted)

    def f_scores(self) -> Fractions:
        """F of each class, K values; NaN for a class without a counted boundary pixel in truth and prediction."""
        # Without a pixel on one side, precision or recall is undefined while the other is 0: F is 0 then.
        precision = np.nan_to_num(_ratio(self.right, self.predicted))
        recall = np.nan_to_num(_ratio(self.found, self.true))
        scores = np.nan_to_num(_ratio(2 * precision * recall, precision + recall))
        return np.where(self.true + self.predicted > 0, scores, np.nan)

    def score(self) -> float:
        """Mean of `f_scores` over the classes that have one; NaN where none has."""
        return _mean(self.f_scores())

    def _count(
        self,
        identity: int,
        true: npt.NDArray[np.bool_],
        predicted: npt.NDArray[np.bool_],
        counted: npt.NDArray[np.bool_],
    ) -> None:
        near_true, near_predicted = self._dilate(true), self._dilate(predicted)
        true, predicted = true & counted, predicted & counted
        self.true[identity] += np.count_nonzero(true)
        self.predicted[identity] += np.count_nonzero(predicted)
        self.found[identity] += np.count_nonzero(near_predicted[true])
        self.right[identity] += np.count_nonzero(near_true[predicted])

    def _dilate(self, pixels: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
        near: npt.NDArray[np.uint8] = np.empty(pixels.shape, dtype=np.uint8)
        cv2.dilate(pixels.astype(np.uint8), self._disc, dst=near)
        return near


def _boundaries(labels: Labels, void: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Pixels that have a 4-neighbour of another class, neither being void."""
    edge = np.zeros(labels.shape, dtype=bool)
    down = (labels[1:] != labels[:-1]) & ~void[1:] & ~void[:-1]
    across = (labels[:, 1:] != labels[:, :-1]) & ~void[:, 1:] & ~void[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return edge


def _disc(radius: int) -> npt.NDArray[np.uint8]:
    """Every offset within `radius`, by Euclidean distance (OpenCV's ellipse is a coarser shape)."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x * x + y * y <= radius * radius, dtype=np.uint8)


def _check_classes(classes: int) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise ConfigError(f"got {classes} classes; expected 1 to {MAX_CLASSES}")


def _check_pair(truth: Labels, prediction: Labels, classes: int) -> None:
    if truth.dtype != np.uint8 or prediction.dtype != np.uint8 or truth.ndim != 2 or truth.shape != prediction.shape:
        raise InputError(
            f"truth is {truth.dtype} {truth.shape} and prediction {prediction.dtype} {prediction.shape}; "
            "expected two uint8 maps H×W of one size"
        )
    if truth.size == 0:
        raise InputError(f"the label maps are empty ({truth.shape})")
    if prediction.max() >= classes:
        raise InputError(f"the prediction holds class {prediction.max()}; expected 0 to {classes - 1}")
    if ((truth >= classes) & (truth != IGNORE)).any():
        worst = truth[truth != IGNORE].max()
        raise InputError(f"the truth holds class {worst}; expected 0 to {classes - 1}, or {IGNORE} for void")


def _ratio(above: npt.ArrayLike, below: npt.ArrayLike) -> Fractions:
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    result: Fractions = np.full(below.shape, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result


def _mean(values: Fractions) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
