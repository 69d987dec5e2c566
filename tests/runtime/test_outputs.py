"""Outputs hold what they should, appear whole or not at all, and leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.outputs import Products, geojson, remove_temporaries, temporary_beside, write_files
from ddsm_deploy.runtime.segmentation import Segmentation

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))  # RGB


@pytest.fixture
def image() -> np.ndarray:
    return np.full((20, 30, 3), 100, np.uint8)


@pytest.fixture
def segmentation() -> Segmentation:
    """Class 1, in it a block of class 2 and in that a hole."""
    mask = np.full((20, 30), 1, np.uint8)
    mask[4:16, 6:20] = 2
    mask[7:12, 9:15] = 1
    confidence = np.tile(np.arange(30, dtype=np.uint8) * 8, (20, 1))
    return Segmentation(mask=mask, classes=("a", "b", "c"), palette=PALETTE, confidence=confidence)


def pixels(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_images(segmentation: Segmentation, image: np.ndarray) -> None:
    encoded = Products(color=True, overlay=True, confidence=True).encode(segmentation, image, file_name="x.png")
    assert list(encoded) == ["color", "overlay", "confidence", "masks"]
    mask = pixels(encoded["masks"])
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, segmentation.mask)
    assert np.array_equal(pixels(encoded["confidence"]), segmentation.confidence)
    bgr = np.array(PALETTE, np.uint8)[:, ::-1][segmentation.mask]
    assert np.array_equal(pixels(encoded["color"]), bgr)
    half = pixels(encoded["overlay"])[18, 28].astype(float)  # far from edges, where JPEG is near the truth
    assert np.abs(half - (0.5 * image + 0.5 * bgr)[18, 28]).max() < 4


def test_files_only_of_what_is_asked_for() -> None:
    assert Products().files("x/a") == {"masks": "masks/x/a.png"}
    assert Products(overlay=True, polygons="geojson").files("a") == {
        "overlay": "overlay/a.jpg",
        "polygons": "polygons/a.geojson",
        "masks": "masks/a.png",
    }


def test_geojson_of_a_line_of_pixels() -> None:
    """RFC 7946, 3.1.6: a ring has four or more positions, and its last is its first."""
    mask = np.zeros((30, 20), np.uint8)
    mask[5:25, 7] = 1
    document = geojson(Segmentation(mask=mask, classes=("a", "b"), palette=((0, 0, 0),) * 2))
    (line,) = (f["geometry"]["coordinates"] for f in document["features"] if f["properties"]["name"] == "b")
    assert line == [[[7, 5], [7, 24], [7, 5], [7, 5]]]


def test_unknown_polygon_format() -> None:
    with pytest.raises(ConfigError, match="expected geojson or coco"):
        Products(polygons="svg")


def test_geojson(segmentation: Segmentation, image: np.ndarray) -> None:
    encoded = Products(polygons="geojson").encode(segmentation, image, file_name="x.png")
    document = json.loads(encoded["polygons"])
    assert document["type"] == "FeatureCollection"
    assert (document["width"], document["height"]) == (30, 20)
    assert sorted(feature["properties"]["name"] for feature in document["features"]) == ["b", "b", "c"]
    for feature in document["features"]:
        assert feature["type"] == "Feature"
        assert feature["geometry"]["type"] == "Polygon"
        assert feature["properties"]["name"] == ("a", "b", "c")[feature["properties"]["class_id"]]
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
    ring_block = next(f for f in document["features"] if f["properties"]["name"] == "c")
    assert len(ring_block["geometry"]["coordinates"]) == 2, "one outline, one hole"
    corners = {tuple(point) for point in ring_block["geometry"]["coordinates"][0]}
    assert corners == {(6.0, 4.0), (19.0, 4.0), (19.0, 15.0), (6.0, 15.0)}
    areas = sum(feature["properties"]["area"] for feature in document["features"])
    assert areas == segmentation.mask.size


def test_jpeg_refuses_what_it_can_not_hold() -> None:
    wide = np.zeros((1, 70_000), np.uint8)
    segmentation = Segmentation(mask=wide, classes=("a",), palette=((1, 2, 3),))
    with pytest.raises(InputError, match=r"encoded as \.jpg"):
        Products(overlay=True).encode(segmentation, np.zeros((1, 70_000, 3), np.uint8), file_name="x")


def test_written_files_replace_older_ones(tmp_path: Path) -> None:
    write_files(tmp_path, {"masks/x/a.png": b"old"})
    write_files(tmp_path, {"masks/x/a.png": b"new", "color/x/a.png": b"c"})
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {
        "masks/x/a.png",
        "color/x/a.png",
    }
    assert (tmp_path / "masks/x/a.png").read_bytes() == b"new"


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    """The second product's folder is taken by a file, so nothing of the first one may appear either."""
    (tmp_path / "masks").write_text("in the way")
    with pytest.raises(OSError, match="masks"):
        write_files(tmp_path, {"color/a.png": b"c", "masks/a.png": b"m"})
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["masks"]


def test_names_of_full_length_can_be_written(tmp_path: Path) -> None:
    name = "n" * 240 + ".coco.json"
    write_files(tmp_path, {f"polygons/{name}": b"{}"})
    assert (tmp_path / "polygons" / name).exists()


def test_left_overs_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "masks/a.png", tmp_path / "masks/.ddsm-notes", tmp_path / "other/.ddsm-1-1.part"]
    lost = [tmp_path / "masks/deep/b.png", tmp_path / "annotations.json"]
    for path in (*kept, *lost):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in kept:
        path.write_text("x")
    for path in lost:
        temporary_beside(path).write_text("half")
    remove_temporaries(tmp_path)
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    remove_temporaries(tmp_path / "fresh")
