"""Metrics against cases worked out by hand, against torchmetrics, and by their properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import numpy as np
import pytest

from ddsm_deploy.datasets import IGNORE
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.evaluate.metrics import BoundaryScore, ConfusionMatrix

SIZES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def maps(*, void: bool) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Pairs (truth, prediction) of one size over three classes; truth with void pixels if asked for."""
    truth = st.sampled_from([0, 1, 2, IGNORE] if void else [0, 1, 2])
    return SIZES.flatmap(
        lambda size: st.tuples(
            hypothesis.extra.numpy.arrays(np.uint8, size, elements=truth),
            hypothesis.extra.numpy.arrays(np.uint8, size, elements=st.integers(0, 2)),
        )
    )


def grid(text: str) -> np.ndarray:
    """A label map drawn in digits, rows apart by spaces; a dot is void."""
    return np.array([[IGNORE if c == "." else int(c) for c in row] for row in text.split()], dtype=np.uint8)


def stripes(height: int, *widths: int) -> np.ndarray:
    """Vertical stripes of classes 0, 1, 0, 1, ..."""
    row = np.concatenate([np.full(width, i % 2, dtype=np.uint8) for i, width in enumerate(widths)])
    return np.tile(row, (height, 1))


class TestConfusionMatrix:
    def test_by_hand(self) -> None:
        matrix = ConfusionMatrix(4)
        matrix.update(grid("001 11. 222"), grid("011 111 202"))
        # class 0: 1 of {2 true, 2 predicted}; 1: 3 of {3, 4}; 2: 2 of {3, 2}; class 3 nowhere; 6 of 8 pixels right
        np.testing.assert_array_equal(matrix.counts, [[1, 1, 0, 0], [0, 3, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]])
        np.testing.assert_allclose(matrix.iou(), [1 / 3, 3 / 4, 2 / 3, math.nan])
        assert matrix.miou() == pytest.approx((1 / 3 + 3 / 4 + 2 / 3) / 3)
        assert matrix.pixel_accuracy() == pytest.approx(6 / 8)

    def test_a_class_that_is_only_predicted_counts_as_zero(self) -> None:
        matrix = ConfusionMatrix(3)
        matrix.update(grid("0000"), grid("0001"))
        np.testing.assert_allclose(matrix.iou(), [3 / 4, 0, math.nan])
        assert matrix.miou() == pytest.approx(3 / 8)

    def test_counts_of_images_add_up_before_the_division(self) -> None:
        matrix = ConfusionMatrix(2)
        matrix.update(grid("01"), grid("01"))
        matrix.update(grid("0000 1111"), grid("1111 1111"))
        np.testing.assert_allclose(matrix.iou(), [1 / 5, 5 / 9])

    def test_only_void(self) -> None:
        matrix = ConfusionMatrix(2)
        matrix.update(grid(".. .."), grid("01 10"))
        assert matrix.counts.sum() == 0
        assert math.isnan(matrix.miou())
        assert math.isnan(matrix.pixel_accuracy())

    def test_the_last_of_255_classes(self) -> None:
        matrix = ConfusionMatrix(255)
        matrix.update(np.array([[254, 254, 0]], np.uint8), np.array([[254, 253, 254]], np.uint8))
        assert matrix.counts[254, 254] == matrix.counts[254, 253] == matrix.counts[0, 254] == 1
        assert matrix.counts.sum() == 3

    @hypothesis.given(maps(void=True))
    @hypothesis.settings(deadline=None)
    def test_agrees_with_counting_pixel_by_pixel(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        matrix = ConfusionMatrix(3)
        matrix.update(*pair)
        expected = np.zeros((3, 3), dtype=np.int64)
        for truth, prediction in zip(pair[0].flat, pair[1].flat, strict=True):
            if truth != IGNORE:
                expected[truth, prediction] += 1
        np.testing.assert_array_equal(matrix.counts, expected)

    @hypothesis.given(maps(void=False))
    @hypothesis.settings(deadline=None)
    def test_bounds_symmetry_and_relabelling(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        one, swapped, relabelled = ConfusionMatrix(3), ConfusionMatrix(3), ConfusionMatrix(3)
        one.update(*pair)
        swapped.update(pair[1], pair[0])
        order = np.array([2, 0, 1], dtype=np.uint8)
        relabelled.update(order[pair[0]], order[pair[1]])
        assert 0 <= one.miou() <= 1
        assert one.miou() == pytest.approx(swapped.miou()) == pytest.approx(relabelled.miou())
        np.testing.assert_allclose(relabelled.iou()[order], one.iou())
        assert (one.miou() == 1) == bool((pair[0] == pair[1]).all())

    def test_miou_agrees_with_torchmetrics(self, need: Callable[[str], None]) -> None:
        for module in ("torch", "torchmetrics"):
            need(module)
        import torch
        from torchmetrics import classification

        theirs = classification.MulticlassJaccardIndex(num_classes=11, average="macro", ignore_index=IGNORE)
        theirs_per_class = classification.MulticlassJaccardIndex(num_classes=11, average="none", ignore_index=IGNORE)
        theirs_accuracy = classification.MulticlassAccuracy(num_classes=11, average="micro", ignore_index=IGNORE)
        ours = ConfusionMatrix(11)
        random = np.random.default_rng(0)
        for _ in range(3):
            truth = random.integers(0, 11, (40, 50), dtype=np.uint8)
            prediction = np.where(random.random(truth.shape) < 0.6, truth, random.integers(0, 11, truth.shape))
            truth[random.random(truth.shape) < 0.1] = IGNORE
            prediction = prediction.astype(np.uint8)
            ours.update(truth, prediction)
            for metric in (theirs, theirs_per_class, theirs_accuracy):
                metric.update(torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
        assert ours.miou() == pytest.approx(float(theirs.compute()), abs=1e-6)
        assert ours.pixel_accuracy() == pytest.approx(float(theirs_accuracy.compute()), abs=1e-6)
        np.testing.assert_allclose(ours.iou(), theirs_per_class.compute().numpy(), atol=1e-6)


class TestBoundaryScore:
    @pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (2, 1.0), (3, 1.0), (4, 0.0)])
    def test_a_straight_edge_moved_by_some_pixels(self, shift: int, expected: float) -> None:
        score = BoundaryScore(2, tolerance=3)
        score.update(stripes(10, 20, 20), stripes(10, 20 + shift, 20 - shift))
        assert score.score() == expected
        np.testing.assert_array_equal(score.true, [10, 10])  # one column of boundary a class, 10 rows
        np.testing.assert_array_equal(score.predicted, [10, 10])

    def test_a_spurious_stripe_costs_precision_and_not_recall(self) -> None:
        score = BoundaryScore(2, tolerance=1)
        score.update(stripes(8, 20, 20), stripes(8, 5, 5, 10, 20))
        np.testing.assert_array_equal(score.found, score.true)
        np.testing.assert_array_equal(score.predicted, [24, 24])  # three edges instead of one
        np.testing.assert_array_equal(score.right, [8, 8])
        assert score.score() == pytest.approx(2 * (1 / 3) * 1 / (1 / 3 + 1))

    def test_the_tolerance_is_a_disc(self) -> None:
        truth, prediction = np.zeros((2, 40, 40), dtype=np.uint8)
        truth[20, 20] = 1
        prediction[22, 22] = 1  # √8 away: within 3 pixels and beyond 2
        far, near = BoundaryScore(2, tolerance=2), BoundaryScore(2, tolerance=3)
        far.update(truth, prediction)
        near.update(truth, prediction)
        assert far.f_scores()[1] == 0
        assert near.f_scores()[1] == 1

    def test_tolerance_zero_by_hand(self) -> None:
        score = BoundaryScore(2, tolerance=0)
        score.update(grid("0011 0011"), grid("0011 0111"))
        # (row, column) of class 0: true {(0,1), (1,1)}, predicted {(0,1), (1,0)};
        # of class 1: true {(0,2), (1,2)}, predicted {(0,2), (1,1)}
        np.testing.assert_array_equal(score.predicted, [2, 2])
        np.testing.assert_array_equal(score.right, [1, 1])
        np.testing.assert_array_equal(score.found, [1, 1])
        assert score.score() == pytest.approx(0.5)

    def test_neither_the_image_edge_nor_void_is_a_boundary(self) -> None:
        score = BoundaryScore(2, tolerance=1)
        score.update(grid("000..111 000..111"), grid("00001111 00001111"))
        assert score.true.sum() == score.predicted.sum() == 0
        assert math.isnan(score.score())

    def test_boundaries_close_to_void_are_not_counted(self) -> None:
        truth = stripes(12, 20, 20)
        truth[:4] = IGNORE
        score = BoundaryScore(2, tolerance=2)
        score.update(truth, stripes(12, 28, 12))
        # rows 4 and 5 are within two pixels of void (row 3), rows 6 to 11 are counted
        np.testing.assert_array_equal(score.true, [6, 6])
        np.testing.assert_array_equal(score.predicted, [6, 6])
        assert score.score() == 0

    def test_a_class_on_one_side_only_scores_zero(self) -> None:
        score = BoundaryScore(4, tolerance=1)
        score.update(stripes(6, 10, 10), np.zeros((6, 20), dtype=np.uint8))
        np.testing.assert_array_equal(score.f_scores(), [0, 0, math.nan, math.nan])
        assert score.score() == 0

    @hypothesis.given(maps(void=True), st.integers(0, 4))
    @hypothesis.settings(deadline=None)
    def test_agrees_with_distances_pixel_by_pixel(self, pair: tuple[np.ndarray, np.ndarray], tolerance: int) -> None:
        score = BoundaryScore(3, tolerance=tolerance)
        score.update(*pair)
        truth, prediction = pair
        void = list(zip(*np.nonzero(truth == IGNORE), strict=True))
        for identity in range(3):
            true, predicted = (slow_boundary(m, truth, identity) for m in (truth, prediction))
            counted_true = [p for p in true if not near(p, void, tolerance)]
            counted_predicted = [p for p in predicted if not near(p, void, tolerance)]
            assert score.true[identity] == len(counted_true)
            assert score.predicted[identity] == len(counted_predicted)
            assert score.found[identity] == sum(near(p, predicted, tolerance) for p in counted_true)
            assert score.right[identity] == sum(near(p, true, tolerance) for p in counted_predicted)

    @hypothesis.given(maps(void=False), st.integers(0, 4))
    @hypothesis.settings(deadline=None)
    def test_bounds_symmetry_and_growth(self, pair: tuple[np.ndarray, np.ndarray], tolerance: int) -> None:
        scores = []
        for truth, prediction, pixels in [(*pair, tolerance), (*pair[::-1], tolerance), (*pair, tolerance + 1)]:
            score = BoundaryScore(3, tolerance=pixels)
            score.update(truth, prediction)
            scores.append(score.score())
        one, swapped, wider = scores
        assert math.isnan(one) or 0 <= one <= 1
        assert one == pytest.approx(swapped, nan_ok=True)
        assert math.isnan(one) or wider >= one - 1e-12

    @hypothesis.given(maps(void=False))
    @hypothesis.settings(deadline=None)
    def test_a_perfect_mask(self, pair: tuple[np.ndarray, np.ndarray]) -> None:
        score = BoundaryScore(3, tolerance=0)
        score.update(pair[0], pair[0])
        assert math.isnan(score.score()) == (len(np.unique(pair[0])) == 1)
        assert math.isnan(score.score()) or score.score() == 1

    def test_a_tolerance_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match="tolerance is -1 pixels; expected 0 to 100"):
            BoundaryScore(2, tolerance=-1)


@pytest.mark.parametrize("kind", [ConfusionMatrix, BoundaryScore])
class TestBadMaps:
    def test_class_count(self, kind: type[ConfusionMatrix | BoundaryScore]) -> None:
        for count in (0, 256):
            with pytest.raises(ConfigError, match=f"got {count} classes; expected 1 to 255"):
                kind(count)

    @pytest.mark.parametrize(
        ("truth", "prediction", "words"),
        [
            (np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), "expected two uint8 maps"),
            (np.zeros((2, 3), np.int64), np.zeros((2, 3), np.uint8), "truth is int64"),
            (np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.float32), "prediction float32"),
            (np.zeros((1, 2, 3), np.uint8), np.zeros((1, 2, 3), np.uint8), "expected two uint8 maps"),
            (np.zeros((0, 3), np.uint8), np.zeros((0, 3), np.uint8), "empty"),
            (np.zeros((2, 3), np.uint8), np.full((2, 3), 2, np.uint8), "prediction holds class 2; expected 0 to 1"),
            (np.full((2, 3), 7, np.uint8), np.zeros((2, 3), np.uint8), "truth holds class 7; expected 0 to 1"),
        ],
    )
    def test_maps(
        self, kind: type[ConfusionMatrix | BoundaryScore], truth: np.ndarray, prediction: np.ndarray, words: str
    ) -> None:
        metric = kind(2)
        with pytest.raises(InputError, match=words):
            metric.update(truth, prediction)


def near(point: tuple[int, int], others: list[tuple[int, int]], tolerance: int) -> bool:
    """Whether any of the pixels `others` lies within `tolerance` of `point`; by the definition, not by dilation."""
    y, x = map(int, point)
    return any((y - int(v)) ** 2 + (x - int(u)) ** 2 <= tolerance**2 for v, u in others)


def slow_boundary(labels: np.ndarray, truth: np.ndarray, identity: int) -> list[tuple[int, int]]:
    """Pixels of a class with a 4-neighbour of another class, void left out; by the definition, pixel by pixel."""
    found = []
    for y, x in zip(*np.nonzero((labels == identity) & (truth != IGNORE)), strict=True):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= v < labels.shape[0] and 0 <= u < labels.shape[1]
            if inside and truth[v, u] != IGNORE and labels[v, u] != identity:
                found.append((y, x))
                break
    return found
