"""How far two ways of running one model are apart, in what counts: the class of each pixel.

`ParityMeter` gathers counts frame by frame and divides once at the end. One meter serves `ddsm verify`, the end of
every export, quantization and engine build, and the choice of a backend, so that their figures mean the same thing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Labels
from ddsm_deploy.spec import MAX_CLASSES

Counts = npt.NDArray[np.int64]
Logits = npt.NDArray[np.floating[Any]]

BOUNDARY = 3
"""Default reach of a boundary, pixels."""

MAX_BOUNDARY = 100

_VOID = 255  # what `datasets.IGNORE` is: a label that no class has


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityBudget:
    """How far apart two runs may be.

    Attributes:
        changed: most per cent of the pixels (0..100) whose class may differ.
        miou_drop: most points (0..100) that B's mIoU may lie below A's; None sets no limit.
        logit_error: largest absolute difference that a logit may have; None sets no limit.
    """

    changed: float = 0.1
    miou_drop: float | None = None
    logit_error: float | None = None

    def __post_init__(self) -> None:
        for name, most in (("changed", 100.0), ("miou_drop", 100.0), ("logit_error", math.inf)):
            value = getattr(self, name)
            if value is None and name != "changed":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ConfigError(f"the parity budget's {name} is {value!r}; expected a number from 0 to {most:g}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ParityResult:
    """What a comparison of A with B gave. It is true if, and only if, nothing failed. Shares are per cent, 0..100.

    Attributes:
        classes: names, in the order of their ids.
        images: frames compared.
        pixels: pixels compared, all frames together.
        changed: share of the pixels whose class differs.
        changed_per_class: name -> share of A's pixels of that class that B gives another; NaN where A has none.
        changed_near_boundary: share of the pixels within `boundary_px` of a class boundary of A that changed; NaN where
            there is no boundary.
        changed_elsewhere: likewise of all other pixels.
        boundary_px: that reach, pixels.
        confusion: int64 K×K, ``confusion[a, b]`` pixels had class a in A and class b in B.
        miou_a: mean IoU of A, over the frames with labels; None without any.
        miou_b: that of B.
        max_logit_error: largest absolute difference of a logit, infinite where one is no finite number; None without
            logits.
        mean_logit_error: mean of it, likewise.
        worst: names of the frames with most changes and their share of changed pixels, the worst first.
        budget: what was allowed.
        failures: what exceeds it, a sentence each.
    """

    classes: tuple[str, ...]
    images: int
    pixels: int
    changed: float
    changed_per_class: Mapping[str, float]
    changed_near_boundary: float
    changed_elsewhere: float
    boundary_px: int
    confusion: Counts
    miou_a: float | None
    miou_b: float | None
    max_logit_error: float | None
    mean_logit_error: float | None
    worst: tuple[tuple[str, float], ...]
    budget: ParityBudget
    failures: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def miou_drop(self) -> float | None:
        """Points that B's mIoU lies below A's (negative: above); None without labels."""
        return None if self.miou_a is None or self.miou_b is None else self.miou_a - self.miou_b

    def pixels_of(self, name: str) -> int:
        """Pixels that have a class in A."""
        return int(self.confusion[self.classes.index(name)].sum())

    def changes(self, most: int = 10) -> list[tuple[str, str, int]]:
        """The commonest changes as (class in A, class in B, pixels), the commonest first."""
        counts = self.confusion.copy()
        np.fill_diagonal(counts, 0)
        order = np.argsort(-counts, axis=None, kind="stable")[:most]
        pairs = ((int(i) // len(counts), int(i) % len(counts)) for i in order)
        return [(self.classes[a], self.classes[b], int(counts[a, b])) for a, b in pairs if counts[a, b]]

    def fields(self) -> dict[str, Any]:
        """The result as plain values that JSON has: None for what is no finite number."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["passed"] = bool(self)
        values["miou_drop"] = self.miou_drop
        values["confusion"] = self.confusion.tolist()
        values["budget"] = dataclasses.asdict(self.budget)
        values["worst"] = [{"name": name, "changed": share} for name, share in self.worst]
        return {key: _plain(value) for key, value in values.items()}

    def to_json(self) -> str:
        """`fields` as JSON text."""
        return json.dumps(self.fields(), indent=2, ensure_ascii=False)

    def facts(self) -> dict[str, str]:
        """The figures as flat texts for a record's provenance.

        They are rounded coarsely, so that machines whose rounding differs write the same bytes wherever they can.
        """
        facts = {"parity.images": str(self.images), "parity.changed": f"{self.changed:.2f}"}
        if self.miou_a is not None and self.miou_b is not None:
            facts |= {"parity.miou_reference": f"{self.miou_a:.2f}", "parity.miou": f"{self.miou_b:.2f}"}
        if self.max_logit_error is not None:
            facts["parity.max_logit_error"] = f"{self.max_logit_error:.0e}"
        return facts


class ParityMeter:
    """Compares two runs of one model, frame by frame.

    The boundary of A is every pixel with a 4-neighbour of another class; a pixel is near it if its distance (Euclidean,
    between centres, inclusive) to one of those is at most `boundary`.

    Args:
        classes: names, in the order of their ids; 1 to 255.
        boundary: that reach, pixels, 0 to `MAX_BOUNDARY`.
        keep_worst: how many of the worst frames to name.

    Raises:
        ConfigError: out of these ranges.
    """

    def __init__(self, classes: Sequence[str], *, boundary: int = BOUNDARY, keep_worst: int = 4) -> None:
        if not 1 <= len(classes) <= MAX_CLASSES:
            raise ConfigError(f"got {len(classes)} classes; expected 1 to {MAX_CLASSES}")
        if not 0 <= boundary <= MAX_BOUNDARY:
            raise ConfigError(f"boundary is {boundary} pixels; expected 0 to {MAX_BOUNDARY}")
        if keep_worst < 0:
            raise ConfigError(f"keep_worst is {keep_worst}; expected 0 or more")
        self._classes = tuple(classes)
        self._boundary, self._keep_worst = boundary, keep_worst
        y, x = np.ogrid[-boundary : boundary + 1, -boundary : boundary + 1]
        self._disc = np.asarray(x * x + y * y <= boundary * boundary, dtype=np.uint8)
        shape = (len(classes), len(classes))
        self._confusion: Counts = np.zeros(shape, np.int64)
        self._truth_a: Counts = np.zeros(shape, np.int64)
        self._truth_b: Counts = np.zeros(shape, np.int64)
        self._near = self._near_changed = self._images = 0
        self._labelled = False
        self._logits = _LogitErrors()
        self._worst: list[tuple[str, float]] = []

    def update(
        self,
        a: Labels,
        b: Labels,
        *,
        truth: Labels | None = None,
        logits: tuple[Logits, Logits] | None = None,
        name: str = "",
    ) -> None:
        """Adds one frame.

        Args:
            a: uint8, H×W, class ids: the reference.
            b: likewise: what is judged.
            truth: uint8, H×W, class ids or 255 for void.
            logits: A's and B's, of one shape; numbers that are not finite fail the comparison.
            name: of the frame, for the list of the worst.

        Raises:
            InputError: types or shapes differ from that, or a value is no class id.
        """
        count = len(self._classes)
        _check_masks(a, b, count)
        if truth is not None:
            _check_truth(truth, a, count)
        if logits is not None:
            self._logits.update(*logits)  # first of all updates: it may raise
        different = a != b
        self._confusion += _pairs(a, b, count)
        near = self._near_boundary(a)
        self._near += int(np.count_nonzero(near))
        self._near_changed += int(np.count_nonzero(near & different))
        if truth is not None:
            self._labelled = True
            known = truth != _VOID
            self._truth_a += _pairs(truth[known], a[known], count)
            self._truth_b += _pairs(truth[known], b[known], count)
        self._images += 1
        self._worst.append((name or f"frame {self._images}", _share(int(np.count_nonzero(different)), a.size)))
        self._worst.sort(key=lambda entry: -entry[1])  # stable: of equals the earlier one stays ahead
        del self._worst[self._keep_worst :]

    def result(self, budget: ParityBudget | None = None) -> ParityResult:
        """The figures so far, held against a budget; None is that of `ParityBudget`'s defaults.

        Raises:
            ConfigError: no frame was compared, or the budget limits what was not measured: either would pass unseen.
        """
        budget = budget or ParityBudget()
        if not self._images:
            raise ConfigError("nothing was compared: no frame; a comparison of nothing would always pass")
        if self._labelled and not self._truth_a.sum():
            raise ConfigError("no pixel of the frames compared has a label")
        counts = self._confusion
        pixels, equal = int(counts.sum()), int(np.trace(counts))
        changed_of = _shares(counts.sum(axis=1) - np.diag(counts), counts.sum(axis=1))
        elsewhere, elsewhere_changed = pixels - self._near, pixels - equal - self._near_changed
        result = ParityResult(
            classes=self._classes,
            images=self._images,
            pixels=pixels,
            changed=_share(pixels - equal, pixels),
            changed_per_class=dict(zip(self._classes, changed_of, strict=True)),
            changed_near_boundary=_share(self._near_changed, self._near),
            changed_elsewhere=_share(elsewhere_changed, elsewhere),
            boundary_px=self._boundary,
            confusion=counts.copy(),
            miou_a=_miou(self._truth_a) if self._labelled else None,
            miou_b=_miou(self._truth_b) if self._labelled else None,
            max_logit_error=self._logits.largest if self._logits.count else None,
            mean_logit_error=self._logits.mean if self._logits.count else None,
            worst=tuple(self._worst),
            budget=budget,
            failures=(),
        )
        return dataclasses.replace(result, failures=tuple(_failures(result, self._logits)))

    def _near_boundary(self, mask: Labels) -> npt.NDArray[np.bool_]:
        edge = np.zeros(mask.shape, np.uint8)
        down, across = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
        edge[1:] |= down
        edge[:-1] |= down
        edge[:, 1:] |= across
        edge[:, :-1] |= across
        return np.asarray(cv2.dilate(edge, self._disc), dtype=bool)


class _LogitErrors:
    """Largest and mean absolute difference of two sets of logits, summed up frame by frame."""

    def __init__(self) -> None:
        self.count = self.broken = 0
        self._largest = self._total = 0.0

    @property
    def largest(self) -> float:
        return math.inf if self.broken else self._largest

    @property
    def mean(self) -> float:
        return math.inf if self.broken else self._total / self.count

    def update(self, a: Logits, b: Logits) -> None:
        floats = all(isinstance(x, np.ndarray) and np.issubdtype(x.dtype, np.floating) for x in (a, b))
        if not floats or a.shape != b.shape or not a.size:
            kinds = " and ".join(f"{getattr(x, 'dtype', type(x).__name__)} {np.shape(x)}" for x in (a, b))
            raise InputError(f"the logits are {kinds}; expected two float arrays of one shape")
        # float64: the difference of two float16 logits can exceed what float16 holds
        with np.errstate(invalid="ignore"):  # infinite on both sides gives NaN, so nothing broken slips through
            error = np.abs(a.astype(np.float64) - b.astype(np.float64))
        good = np.isfinite(error)
        self.count += a.size
        self.broken += a.size - int(np.count_nonzero(good))
        if good.any():
            self._largest = max(self._largest, float(error[good].max()))
            self._total += float(error[good].sum())


def _failures(result: ParityResult, logits: _LogitErrors) -> list[str]:
    budget, found = result.budget, []
    if logits.broken:
        found.append(f"{logits.broken} of {logits.count} logits are NaN or infinite")
    if not result.changed <= budget.changed:
        found.append(f"{result.changed:.3g} % of the pixels changed class, expected at most {budget.changed:g} %")
    if budget.miou_drop is not None:
        if result.miou_a is None or result.miou_b is None:
            raise ConfigError("the budget limits the drop of the mIoU, but no frame has labels")
        if not result.miou_a - result.miou_b <= budget.miou_drop:
            found.append(
                f"mIoU fell from {result.miou_a:.2f} to {result.miou_b:.2f}, expected a drop of at most "
                f"{budget.miou_drop:g}"
            )
    if budget.logit_error is not None:
        if result.max_logit_error is None:
            raise ConfigError("the budget limits the error of the logits, but no logits were compared")
        if not result.max_logit_error <= budget.logit_error:
            found.append(f"a logit is off by {result.max_logit_error:.3g}, expected at most {budget.logit_error:g}")
    return found


def _check_masks(a: Labels, b: Labels, classes: int) -> None:
    for mask in (a, b):
        if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
            kind = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
            raise InputError(f"a mask is {kind}; expected uint8 H×W")
    if a.shape != b.shape:
        raise InputError(f"the masks are of {_size(a)} and {_size(b)} pixels; expected one size")
    for name, mask in (("A", a), ("B", b)):
        if mask.max() >= classes:
            raise InputError(f"{name}'s mask holds class {mask.max()}; expected 0 to {classes - 1}")


def _check_truth(truth: Labels, mask: Labels, classes: int) -> None:
    if not isinstance(truth, np.ndarray) or truth.dtype != np.uint8 or truth.shape != mask.shape:
        kind = f"{truth.dtype} {truth.shape}" if isinstance(truth, np.ndarray) else type(truth).__name__
        raise InputError(f"the truth is {kind}; expected uint8 of {_size(mask)} pixels, the masks' size")
    known = truth[truth != _VOID]
    if known.size and known.max() >= classes:
        raise InputError(f"the truth holds class {known.max()}; expected 0 to {classes - 1}, or {_VOID} for void")


def _size(mask: Labels) -> str:
    return f"{mask.shape[0]}x{mask.shape[1]}"


def _pairs(first: Labels, second: Labels, classes: int) -> Counts:
    index = first.astype(np.uint16) * np.uint16(classes) + second  # at most 254 · 255 + 254, within uint16
    return np.bincount(index.ravel(), minlength=classes * classes).reshape(classes, classes)


def _shares(part: Counts, whole: Counts) -> list[float]:
    return [_share(int(p), int(w)) for p, w in zip(part, whole, strict=True)]


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else math.nan


def _miou(counts: Counts) -> float:
    """Mean IoU in per cent, over the classes in truth or prediction: as `evaluate.metrics.ConfusionMatrix` has it."""
    hits = np.diag(counts)
    unions = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return 100 * float((hits[unions > 0] / unions[unions > 0]).mean())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
