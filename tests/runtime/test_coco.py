"""COCO parts describe a mask pixel for pixel; joined, they are one valid document."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddsm_deploy.runtime.coco import coco_part, run_lengths, write_coco


def decoded(segmentation: object, height: int, width: int) -> np.ndarray:
    """The region's pixels, by COCO's own definitions: runs down the columns, or pixel centres inside the polygon."""
    if isinstance(segmentation, dict):
        assert segmentation["size"] == [height, width]
        counts = segmentation["counts"]
        values = np.arange(len(counts)) % 2
        return np.repeat(values, counts).astype(bool).reshape(width, height).T
    assert isinstance(segmentation, list)
    (flat,) = segmentation
    polygon = np.array(flat, np.float32).reshape(-1, 1, 2)
    inside = np.zeros((height, width), bool)
    for y in range(height):
        for x in range(width):
            inside[y, x] = cv2.pointPolygonTest(polygon, (x + 0.5, y + 0.5), False) > 0
    return inside


def check(mask: np.ndarray) -> dict[str, int]:
    """Rebuilds the mask from its part; returns how many regions came as what."""
    height, width = mask.shape
    part = coco_part(mask, "a.png")
    assert part["image"] == {"file_name": "a.png", "height": height, "width": width}
    rebuilt = np.full(mask.shape, -1)
    kinds = {"polygons": 0, "runs": 0}
    for annotation in part["annotations"]:
        pixels = decoded(annotation["segmentation"], height, width)
        assert (rebuilt[pixels] == -1).all(), "regions never overlap"
        rebuilt[pixels] = annotation["category_id"] - 1
        assert annotation["area"] == pixels.sum()
        rows, columns = np.nonzero(pixels)
        x, y, w, h = annotation["bbox"]
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w - 1, y + h - 1) == (columns.max(), rows.max())
        assert annotation["iscrowd"] == 0
        kinds["runs" if isinstance(annotation["segmentation"], dict) else "polygons"] += 1
    assert np.array_equal(rebuilt, mask)
    return kinds


def test_regions_without_holes_are_polygons_along_pixel_edges() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[:, 5:] = 3
    assert check(mask) == {"polygons": 2, "runs": 0}
    polygon = coco_part(mask, "a")["annotations"][1]["segmentation"][0]
    corners = {(polygon[i], polygon[i + 1]) for i in range(0, len(polygon), 2)}
    assert corners == {(5.0, 0.0), (8.0, 0.0), (8.0, 6.0), (5.0, 6.0)}


def test_a_region_with_a_hole_is_run_lengths() -> None:
    mask = np.zeros((6, 8), np.uint8)
    mask[2:4, 3:5] = 1
    assert check(mask) == {"polygons": 1, "runs": 1}


def test_single_pixels_lines_and_corners_that_touch() -> None:
    mask = np.zeros((5, 7), np.uint8)
    mask[0, 0] = 1
    mask[2, 1:6] = 2
    mask[3, 0] = mask[4, 1] = 4
    check(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_any_mask_is_rebuilt(height: int, width: int, classes: int, seed: int) -> None:
    check(np.random.default_rng(seed).integers(0, classes, (height, width), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mask", "counts"),
    [([[0, 0], [0, 0]], [4]), ([[1, 1], [1, 1]], [0, 4]), ([[1, 0], [0, 1]], [0, 1, 2, 1]), ([[0, 1], [0, 1]], [2, 2])],
)
def test_run_lengths_go_down_the_columns(mask: list[list[int]], counts: list[int]) -> None:
    assert run_lengths(np.array(mask, np.uint8)) == counts


def test_run_lengths_with_empty_columns_beside() -> None:
    small = np.array([[0, 1], [1, 1]], np.uint8)
    wide = np.pad(small, ((0, 0), (3, 2)))
    assert run_lengths(small, before=3, after=2) == run_lengths(wide)


def test_joined_parts_are_one_document(tmp_path: Path) -> None:
    masks = [np.eye(4, dtype=np.uint8), np.zeros((2, 3), np.uint8)]
    parts = []
    for index, mask in enumerate(masks):
        parts.append(tmp_path / f"{index}.json")
        parts[-1].write_text(json.dumps(coco_part(mask, f"ä{index}.png")))
    buffer = io.StringIO()
    write_coco(buffer, iter(parts), ("road", "sky"))
    document = json.loads(buffer.getvalue())
    assert [c["name"] for c in document["categories"]] == ["road", "sky"]
    assert [(i["id"], i["file_name"], i["height"], i["width"]) for i in document["images"]] == [
        (1, "ä0.png", 4, 4),
        (2, "ä1.png", 2, 3),
    ]
    identities = [a["id"] for a in document["annotations"]]
    assert identities == list(range(1, len(identities) + 1))
    areas = {1: 0, 2: 0}
    for annotation in document["annotations"]:
        areas[annotation["image_id"]] += annotation["area"]
    assert areas == {1: 16, 2: 6}


def test_no_part_at_all_is_still_a_document() -> None:
    buffer = io.StringIO()
    write_coco(buffer, [], ("road",))
    document = json.loads(buffer.getvalue())
    assert document["images"] == document["annotations"] == []
