"""Segmentation's ways to show a mask: colours, overlay, polygons."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.segmentation import Segmentation

PALETTE = ((255, 0, 0), (0, 128, 0), (1, 2, 3))


def segmentation(mask: np.ndarray) -> Segmentation:
    return Segmentation(mask=mask.astype(np.uint8), classes=("a", "b", "c"), palette=PALETTE)


MASKS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 2))


def test_color_is_the_palette_in_bgr() -> None:
    colors = segmentation(np.array([[0, 1], [2, 255]])).color()
    assert colors.dtype == np.uint8
    np.testing.assert_array_equal(colors, [[(0, 0, 255), (0, 128, 0)], [(3, 2, 1), (0, 0, 0)]])


def test_overlay_mixes() -> None:
    mask = np.array([[0, 1, 2]])
    image = np.full((1, 3, 3), 100, np.uint8)
    expected = 0.75 * 100 + 0.25 * np.array([[(0, 0, 255), (0, 128, 0), (3, 2, 1)]])
    assert np.abs(segmentation(mask).overlay(image, alpha=0.25) - expected).max() <= 0.5
    np.testing.assert_array_equal(segmentation(mask).overlay(image, alpha=0), image)
    np.testing.assert_array_equal(segmentation(mask).overlay(image, alpha=1), segmentation(mask).color())


def test_overlay_refuses_another_size_or_type() -> None:
    result = segmentation(np.zeros((2, 3)))
    with pytest.raises(InputError, match="got uint8 3x2x3; expected uint8 2x3x3"):
        result.overlay(np.zeros((3, 2, 3), np.uint8))
    with pytest.raises(InputError, match="got float64"):
        result.overlay(np.zeros((2, 3, 3)))
    with pytest.raises(ConfigError, match="alpha"):
        result.overlay(np.zeros((2, 3, 3), np.uint8), alpha=1.5)


def test_a_square_with_a_hole() -> None:
    mask = np.zeros((12, 14))
    mask[2:9, 3:11] = 1  # 7 rows of 8
    mask[4:7, 5:9] = 2  # 3 rows of 4
    ring, core = segmentation(mask).polygons(min_area=1)[1:]
    assert (ring.class_id, ring.name, ring.area) == (1, "b", 7 * 8 - 3 * 4)
    assert (core.class_id, core.name, core.area, core.holes) == (2, "c", 3 * 4, ())
    assert (ring.exterior.min(0).tolist(), ring.exterior.max(0).tolist()) == ([3, 2], [10, 8])  # x, y
    (hole,) = ring.holes
    assert (hole.min(0).tolist(), hole.max(0).tolist()) == ([4, 3], [9, 7])  # the pixels around it
    assert ring.exterior.dtype == np.float32


def test_min_area_drops_specks_and_small_holes() -> None:
    mask = np.zeros((20, 20))
    mask[0:10, 0:10] = 1
    mask[4, 4] = 0  # a hole of one pixel
    mask[15:18, 15:18] = 1
    kept = [p for p in segmentation(mask).polygons(min_area=10) if p.class_id == 1]
    assert [(p.area, len(p.holes)) for p in kept] == [(99, 0)]
    everything = [p for p in segmentation(mask).polygons(min_area=1) if p.class_id == 1]
    assert sorted((p.area, len(p.holes)) for p in everything) == [(9, 0), (99, 1)]


@settings(max_examples=150, deadline=None)
@given(mask=MASKS)
def test_areas_are_the_pixels_of_each_region(mask: np.ndarray) -> None:
    found = segmentation(mask).polygons(min_area=3)
    for class_id in range(3):
        # an independent count: OpenCV's labelling of connected regions
        _, _, stats, _ = cv2.connectedComponentsWithStats((mask == class_id).astype(np.uint8), connectivity=8)
        expected = sorted(area for area in stats[1:, cv2.CC_STAT_AREA] if area >= 3)
        assert sorted(p.area for p in found if p.class_id == class_id) == expected


@settings(max_examples=150, deadline=None)
@given(mask=MASKS)
def test_polygons_draw_the_mask_again(mask: np.ndarray) -> None:
    for scale in (1, 3):
        large = mask.repeat(scale, 0).repeat(scale, 1)
        for polygon in segmentation(large).polygons(min_area=0):
            region = np.zeros_like(large)
            cv2.drawContours(region, [polygon.exterior.astype(np.int32)], -1, 1, cv2.FILLED)
            for hole in polygon.holes:
                cv2.drawContours(region, [hole.astype(np.int32)], -1, 0, cv2.FILLED)
                cv2.polylines(region, [hole.astype(np.int32)], True, 1)
            assert region.sum() == polygon.area
            assert (large[region > 0] == polygon.class_id).all()
