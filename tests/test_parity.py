"""The parity meter against a count pixel by pixel, its budget, and what it refuses to compare."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.parity import ParityBudget, ParityMeter, ParityResult

CLASSES = ("road", "car", "sky")
VOID = 255


@st.composite
def frames(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One to three frames of few pixels: A, B and truth."""
    result = []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
        mask = hnp.arrays(np.uint8, shape, elements=st.integers(0, 2))
        truth = hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, VOID]))
        result.append((draw(mask), draw(mask), draw(truth)))
    return result


def near(mask: np.ndarray, row: int, column: int, reach: int) -> bool:
    """Whether a boundary pixel lies within `reach`, by looking at every pixel of the mask."""
    height, width = mask.shape
    for r, c in itertools.product(range(height), range(width)):
        beside = ((r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1))
        edge = any(0 <= y < height and 0 <= x < width and mask[y, x] != mask[r, c] for y, x in beside)
        if edge and (r - row) ** 2 + (c - column) ** 2 <= reach**2:
            return True
    return False


def per_cent(pairs: list[bool]) -> float:
    return 100 * sum(pairs) / len(pairs) if pairs else math.nan


def slow_miou(pairs: list[tuple[int, int]]) -> float:
    """From (truth, prediction) of every pixel: sets of pixels, class by class."""
    scores = []
    for identity in range(3):
        true = {i for i, (t, _) in enumerate(pairs) if t == identity}
        found = {i for i, (t, p) in enumerate(pairs) if p == identity and t != VOID}
        if true | found:
            scores.append(len(true & found) / len(true | found))
    return 100 * sum(scores) / len(scores)


@given(frames(), st.integers(0, 3))
def test_equals_a_count_pixel_by_pixel(data: list[tuple[np.ndarray, np.ndarray, np.ndarray]], reach: int) -> None:
    meter = ParityMeter(CLASSES, boundary=reach, keep_worst=2)
    pixels: list[tuple[int, int, int, bool]] = []
    shares = []
    for index, (a, b, truth) in enumerate(data):
        meter.update(a, b, truth=truth, name=f"{index}")
        here = [
            (int(a[r, c]), int(b[r, c]), int(truth[r, c]), near(a, r, c, reach))
            for r, c in itertools.product(*map(range, a.shape))
        ]
        shares.append((f"{index}", per_cent([x != y for x, y, _, _ in here])))
        pixels += here
    if all(t == VOID for _, _, t, _ in pixels):
        with pytest.raises(ConfigError, match="no pixel of the frames compared has a label"):
            meter.result()
        return
    result = meter.result(ParityBudget(changed=100))

    assert result
    assert (result.images, result.pixels, result.boundary_px) == (len(data), len(pixels), reach)
    assert result.changed == pytest.approx(per_cent([x != y for x, y, _, _ in pixels]))
    for identity, name in enumerate(CLASSES):
        want = per_cent([x != y for x, y, _, _ in pixels if x == identity])
        assert result.changed_per_class[name] == pytest.approx(want, nan_ok=True)
    for close, got in ((True, result.changed_near_boundary), (False, result.changed_elsewhere)):
        assert got == pytest.approx(per_cent([x != y for x, y, _, n in pixels if n is close]), nan_ok=True)
    for i, j in itertools.product(range(3), range(3)):
        assert result.confusion[i, j] == sum((x, y) == (i, j) for x, y, _, _ in pixels)
    assert result.miou_a == pytest.approx(slow_miou([(t, x) for x, _, t, _ in pixels]))
    assert result.miou_b == pytest.approx(slow_miou([(t, y) for _, y, t, _ in pixels]))
    assert result.worst == tuple(sorted(shares, key=lambda entry: -entry[1])[:2])


def pair(share: int, size: tuple[int, int] = (10, 10)) -> tuple[np.ndarray, np.ndarray]:
    """Two masks that differ in `share` pixels: road in A, car in B."""
    a = np.zeros(size, np.uint8)
    b = a.copy()
    b.flat[:share] = 1
    return a, b


def measured(budget: ParityBudget | None = None, **rest: object) -> ParityResult:
    meter = ParityMeter(CLASSES)
    meter.update(*pair(2), **rest)
    return meter.result(budget)


def test_the_budget_of_changed_pixels() -> None:
    assert measured(ParityBudget(changed=2.0))
    over = measured(ParityBudget(changed=1.9))
    assert not over
    assert over.failures == ("2 % of the pixels changed class, expected at most 1.9 %",)
    assert not measured()  # the default is strict
    assert measured().budget == ParityBudget(changed=0.1)
    assert over.changes() == [("road", "car", 2)]


def test_the_budget_of_miou() -> None:
    truth, _ = pair(0)
    result = measured(ParityBudget(changed=100, miou_drop=50), truth=truth)
    # B: road has 98 of 100 pixels, car 0 of 2, sky appears nowhere; A is the truth itself
    assert (result.miou_a, result.miou_b, result.miou_drop) == (100, pytest.approx(49), pytest.approx(51))
    assert result.failures == ("mIoU fell from 100.00 to 49.00, expected a drop of at most 50",)
    assert measured(ParityBudget(changed=100, miou_drop=51.1), truth=truth)
    gained = ParityMeter(CLASSES)
    gained.update(*reversed(pair(2)), truth=truth)
    assert gained.result(ParityBudget(changed=100, miou_drop=0))


def logits(*changes: float) -> tuple[np.ndarray, np.ndarray]:
    a = np.zeros((3, 10, 10), np.float32)
    b = a.copy()
    b.flat[: len(changes)] = changes
    return a, b


def test_the_budget_of_logits() -> None:
    result = measured(ParityBudget(changed=100, logit_error=0.5), logits=logits(0.25, -0.75))
    assert (result.max_logit_error, result.mean_logit_error) == (0.75, pytest.approx(1 / 300))
    assert result.failures == ("a logit is off by 0.75, expected at most 0.5",)
    assert measured(ParityBudget(changed=100, logit_error=0.75), logits=logits(0.25, -0.75))


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_fail_whatever_the_budget(value: float, sides: tuple[int, ...]) -> None:
    both = logits()
    for side in sides:
        both[side][1, 2, 3] = value
    result = measured(ParityBudget(changed=100), logits=both)
    assert not result
    assert result.failures == ("1 of 300 logits are NaN or infinite",)
    assert result.max_logit_error == result.mean_logit_error == math.inf
    fields = json.loads(result.to_json())
    assert (fields["passed"], fields["max_logit_error"]) == (False, None)
    assert len(measured(ParityBudget(changed=100, logit_error=1e9), logits=both).failures) == 2


def test_float16_logits_are_compared_without_overflow() -> None:
    a, b = (np.full((3, 10, 10), value, np.float16) for value in (60000, -60000))
    result = measured(ParityBudget(changed=100), logits=(a, b))
    assert result  # 59968 is float16's nearest, and the difference is beyond its range
    assert result.max_logit_error == 2 * float(np.float16(60000))


def test_what_was_not_measured_can_not_pass() -> None:
    with pytest.raises(ConfigError, match="nothing was compared"):
        ParityMeter(CLASSES).result()
    with pytest.raises(ConfigError, match="no frame has labels"):
        measured(ParityBudget(changed=100, miou_drop=1))
    with pytest.raises(ConfigError, match="no logits were compared"):
        measured(ParityBudget(changed=100, logit_error=1))


ZEROS = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((ZEROS, ZEROS.T.copy()), "the masks are of 4x5 and 5x4 pixels"),
        ((ZEROS, ZEROS.astype(np.int64)), "a mask is int64"),
        ((ZEROS[None], ZEROS[None]), r"a mask is uint8 \(1, 4, 5\)"),
        ((ZEROS[:0], ZEROS[:0]), r"a mask is uint8 \(0, 5\)"),
        ((ZEROS, ZEROS.tolist()), "a mask is list"),
        ((ZEROS + 3, ZEROS), "A's mask holds class 3; expected 0 to 2"),
        ((ZEROS, ZEROS + 255), "B's mask holds class 255"),
    ],
)
def test_bad_masks(arguments: tuple[np.ndarray, np.ndarray], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ParityMeter(CLASSES).update(*arguments)


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ({"truth": ZEROS[:2]}, r"the truth is uint8 \(2, 5\); expected uint8 of 4x5"),
        ({"truth": ZEROS + 7}, "the truth holds class 7"),
        ({"logits": (np.zeros((3, 4, 5)), np.zeros((3, 4, 4)))}, "expected two float arrays of one shape"),
        ({"logits": (ZEROS, ZEROS)}, "the logits are uint8"),
    ],
)
def test_a_bad_frame_leaves_no_trace(rest: dict[str, object], words: str) -> None:
    meter = ParityMeter(CLASSES)
    meter.update(ZEROS, ZEROS)
    with pytest.raises(InputError, match=words):
        meter.update(ZEROS, ZEROS + 1, **rest)
    result = meter.result()
    assert (result.images, result.pixels, result.changed) == (1, 20, 0)
    assert result.max_logit_error is result.miou_a is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParityMeter(()), "got 0 classes"),
        (lambda: ParityMeter(CLASSES, boundary=-1), "boundary is -1"),
        (lambda: ParityMeter(CLASSES, keep_worst=-1), "keep_worst is -1"),
        (lambda: ParityBudget(changed=math.nan), "changed is nan; expected a number from 0 to 100"),
        (lambda: ParityBudget(changed=101), "changed is 101"),
        (lambda: ParityBudget(miou_drop=-1), "miou_drop is -1"),
        (lambda: ParityBudget(logit_error=True), "logit_error is True"),
    ],
)
def test_bad_settings(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_facts_and_json() -> None:
    truth, _ = pair(0)
    result = measured(ParityBudget(changed=5), truth=truth, logits=logits(2.5e-5), name="one")
    assert result.facts() == {
        "parity.images": "1",
        "parity.changed": "2.00",
        "parity.miou_reference": "100.00",
        "parity.miou": "49.00",
        "parity.max_logit_error": "2e-05",
    }
    fields = json.loads(result.to_json())
    assert fields["confusion"] == [[98, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert fields["changed_per_class"] == {"road": 2.0, "car": None, "sky": None}
    assert (fields["changed_near_boundary"], fields["worst"]) == (None, [{"name": "one", "changed": 2.0}])
    assert fields["budget"] == {"changed": 5, "miou_drop": None, "logit_error": None}
    assert set(measured(ParityBudget(changed=5)).facts()) == {"parity.images", "parity.changed"}
