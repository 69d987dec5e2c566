"""Calibration: which images, which ranges, and the cache."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from colour_graph import colour_spec
from outlier_graph import outlier_graph

from ddsm_deploy.cache import cache_folder
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.export.onnxgraph import plain_graph
from ddsm_deploy.frames import FrameList, frames_in, frames_of
from ddsm_deploy.optimize.calibration import entropy_threshold, ranges_of
from ddsm_deploy.optimize.material import check_frames

SIZE = (8, 12)


@pytest.fixture
def frames(tmp_path: Path) -> FrameList:
    """Six images of one colour each: red 10, 20 ... 60, blue 200, no green."""
    for index in range(6):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((*SIZE, 3), (200, 0, 10 * (index + 1)), np.uint8))
    return frames_in(tmp_path)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return cache_folder() / "calibration"


def measured(frames: FrameList, need, **options: object) -> dict[str, tuple[float, float]]:
    need("onnxruntime")
    graph = plain_graph(outlier_graph(SIZE))
    return ranges_of(graph, colour_spec(size=SIZE), frames, fingerprint=frames.fingerprint(), **options)


def test_ranges_are_those_of_the_images(frames: FrameList, own_cache: Path, need) -> None:
    ranges = measured(frames, need, method="minmax")
    assert set(ranges) == {"rgb", "four", "three"}
    assert ranges["rgb"] == ranges["three"] == (0.0, 200.0)
    assert ranges["four"] == (0.0, 260_000.0)  # a thousand times 200 + 60


def test_percentiles_leave_the_ends_out(tmp_path: Path, own_cache: Path, need) -> None:
    for index in range(2):
        image = np.full((*SIZE, 3), 100, np.uint8)
        image[index, 0] = 250  # 3 of 288 values: a hundredth
        cv2.imwrite(str(tmp_path / f"{index}.png"), image)
    frames = frames_in(tmp_path)
    assert measured(frames, need, method="percentile", percentile=98)["rgb"] == (100.0, 100.0)
    assert measured(frames, need, method="percentile", percentile=100)["rgb"] == (100.0, 250.0)


def test_the_cache_is_used_and_a_damaged_one_is_not(
    frames: FrameList, own_cache: Path, need, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    first = measured(frames, need, method="minmax", progress=lambda text, done, planned: seen.append(text))
    assert len(seen) == len(frames)
    (kept,) = own_cache.iterdir()
    assert measured(frames, need, method="minmax", progress=lambda *_: pytest.fail("measured again")) == first
    fields = json.loads(kept.read_text(encoding="utf-8"))
    fields["minmax"]["rgb"] = [0, float("nan")]
    for damaged in ("", "{}", "[1]", json.dumps(fields), kept.read_text(encoding="utf-8")[:-9]):
        kept.write_text(damaged, encoding="utf-8")
        assert measured(frames, need, method="minmax") == first
    blocked = own_cache.parent / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))  # nothing can be kept there
    assert measured(frames, need, method="minmax") == first


def test_wrong_methods_are_named(frames: FrameList, need) -> None:
    with pytest.raises(ConfigError, match="'best'; expected one of percentile, minmax, entropy"):
        measured(frames, need, method="best")
    with pytest.raises(ConfigError, match="percentile is 40"):
        measured(frames, need, percentile=40.0)


def test_entropy_clips_a_lonely_outlier_and_keeps_an_even_spread() -> None:
    rng = np.random.default_rng(0)
    bell = rng.normal(size=200_000).astype(np.float32)
    assert 2.0 < entropy_threshold(np.append(bell, 40.0)) < 8.0
    even = rng.uniform(-3, 3, 200_000)
    assert entropy_threshold(even) > 2.8
    assert entropy_threshold(np.zeros(5)) == 0.0


def test_choice_is_even_and_repeatable(frames: FrameList) -> None:
    names = [entry.name for entry in frames.spread(3).entries]
    assert names == ["0.png", "2.png", "5.png"]
    assert [e.name for e in frames.without(frames.spread(3)).entries] == ["1.png", "3.png", "4.png"]
    assert len(frames.spread(100)) == 6


def test_fingerprint_is_of_contents_alone(frames: FrameList, tmp_path: Path) -> None:
    before = frames.fingerprint()
    moved = tmp_path / "moved"
    moved.mkdir()
    for entry in frames.entries:
        (moved / f"x{entry.path.name}").write_bytes(entry.path.read_bytes())
    assert frames_in(moved).fingerprint() == before
    cv2.imwrite(str(moved / "x3.png"), np.zeros((*SIZE, 3), np.uint8))
    assert frames_in(moved).fingerprint() != before


def test_doubtful_sets_are_called_so(frames: FrameList, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(InputError, match="1 image to calibrate on; expected at least 2"):
        check_frames(frames.spread(1), colour_spec(size=SIZE))
    (few,) = check_frames(frames, colour_spec(size=SIZE))
    assert "only 6 images" in few
    folder = tmp_path_factory.mktemp("many")
    for index in range(32):
        cv2.imwrite(str(folder / f"{index:02}.png"), np.zeros((8, 8 if index < 5 else 12, 3), np.uint8))
    (bent,) = check_frames(frames_in(folder), colour_spec(size=SIZE))
    assert bent.startswith("5 of 32 images have another shape than the network's 8x12")
    doubts = check_frames(frames_in(folder), colour_spec(size=(80, 120)))
    assert any("32 of 32 images are smaller than the network's 80x120" in doubt for doubt in doubts)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image there"):
        frames_in(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        frames_in(tmp_path / "none")


def test_labels_come_with_a_data_set(scenes: Path) -> None:
    dataset = open_dataset("folder", scenes, "")
    frames = frames_of(dataset)
    assert frames.classes == dataset.classes.names
    for index in (0, 5):
        entry = frames.entries[index]
        assert entry.labels is not None
        np.testing.assert_array_equal(entry.labels(), dataset.labels(index))
