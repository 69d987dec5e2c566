"""The renderer of street-like scenes: right sizes, repeatable, every class, labels that fit the picture."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from render_scenes import CLASSES, write_scenes

from ddsm_deploy.datasets import IGNORE, camvid_classes, open_dataset

REPO = Path(__file__).parent.parent


def test_scenes_are_a_folder_data_set_with_every_class(scenes: Path) -> None:
    dataset = open_dataset("folder", scenes, "")
    assert len(dataset.samples) == 24
    seen: set[int] = set()
    for index, sample in enumerate(dataset.samples):
        image, labels = cv2.imread(str(sample.image)), dataset.labels(index)
        assert image.shape == (96, 128, 3)
        assert labels.shape == (96, 128)
        seen |= set(np.unique(labels).tolist())
    assert seen == {*range(11), IGNORE}


def test_classes_are_camvids() -> None:
    names, palette = zip(*CLASSES, strict=True)
    assert (names, palette) == (camvid_classes().names, camvid_classes().palette)


def test_the_command_is_repeatable_and_the_seed_matters(tmp_path: Path) -> None:
    def digest(name: str, seed: int) -> str:
        command = [sys.executable, REPO / "examples" / "render_scenes.py", tmp_path / name]
        subprocess.run([*command, "--count", "1", "--size", "48x80", "--seed", str(seed)], check=True)
        assert json.loads((tmp_path / name / "classes.json").read_text())[3]["name"] == "road"
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert [path.name for path in files] == ["classes.json", "scene_0000.png", "scene_0000.png"]
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    assert digest("first", 1) == digest("again", 1)
    assert digest("first", 1) != digest("other", 2)


def test_labels_follow_the_picture(tmp_path: Path) -> None:
    # where the label changes, the picture changes far more than elsewhere, windows and leaves included
    write_scenes(tmp_path, count=2, height=90, width=120, seed=4)
    for image_file in (tmp_path / "images").iterdir():
        image = cv2.imread(str(image_file)).astype(np.float32)
        labels = cv2.imread(str(tmp_path / "labels" / image_file.name), cv2.IMREAD_GRAYSCALE)
        step = np.abs(np.diff(image, axis=1)).sum(2)
        border = labels[:, 1:] != labels[:, :-1]
        assert step[border].mean() > 2 * step[~border].mean()


@pytest.mark.parametrize("size", [(64, 64), (60, 200)])
def test_any_shape_of_picture_shows_road_and_sky(tmp_path: Path, size: tuple[int, int]) -> None:
    write_scenes(tmp_path, count=1, height=size[0], width=size[1], seed=0)
    labels = cv2.imread(str(tmp_path / "labels" / "scene_0000.png"), cv2.IMREAD_GRAYSCALE)
    assert labels.shape == size
    assert {0, 3} <= set(np.unique(labels).tolist())


def test_shipped_frames_have_their_labels() -> None:
    frames = sorted((REPO / "examples" / "frames").iterdir())
    assert len(frames) == 6
    for frame in frames:
        labels = cv2.imread(str(REPO / "examples" / "labels" / f"{frame.stem}.png"), cv2.IMREAD_GRAYSCALE)
        assert labels.shape == cv2.imread(str(frame)).shape[:2] == (360, 480)
        assert set(np.unique(labels).tolist()) <= {*range(11), IGNORE}
    assert sum(frame.stat().st_size for frame in frames) < 1_000_000
