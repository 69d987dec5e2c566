"""Augmentation keeps image and labels together, and what lies outside the image is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from ddsm_deploy.datasets import IGNORE, open_dataset
from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.data import (
    PADDING,
    TrainImages,
    photometric,
    random_scale_crop,
    rare_classes,
    strong_photometric,
)


@pytest.mark.parametrize("scale", [(0.3, 0.5), (1.0, 1.0), (1.8, 2.2)])
def test_image_and_labels_move_together(scale: tuple[float, float]) -> None:
    # large squares whose grey value says their class: wherever the crop comes from, the two must still agree
    labels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((40, 40), np.uint8))
    image = np.repeat(labels[..., None] * 20, 3, axis=2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cut, ids = random_scale_crop(image, labels, rng, crop=(64, 96), scale=scale)
        assert cut.shape == (64, 96, 3) and ids.shape == (64, 96)
        inside = ids != PADDING
        assert inside.any()
        agree = cut[..., 0][inside] == ids[inside] * 20
        assert agree.mean() > 0.85  # bilinear mixes neighbours along the squares' borders


def test_small_images_are_padded_with_ignored_grey() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    labels[0, :7] = IGNORE  # 7 pixels that have no label, which is another thing
    cut, ids = random_scale_crop(image, labels, np.random.default_rng(0), crop=(40, 40), scale=(1.0, 1.0))
    assert (ids == 0).sum() == 593 and (ids == IGNORE).sum() == 7 and (ids == PADDING).sum() == 1000
    assert (cut[ids == PADDING] == 127).all()
    assert (cut[ids != PADDING] == 0).all()


@pytest.mark.parametrize("change", [photometric, strong_photometric])
def test_photometric_changes_values_not_geometry(change: Callable[..., np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = (40, 120, 200)
    changed = [change(image, rng) for _ in range(100)]
    assert all(c.shape == image.shape and c.dtype == np.uint8 for c in changed)
    assert len({c[16, 16].tobytes() for c in changed}) > 5
    for c in changed:  # the square stays the brighter part, where it was
        assert c[12:20, 12:20].mean() > c[:4].mean()


def test_strong_changes_leave_a_picture_whose_light_and_colour_are_others() -> None:
    grey = np.repeat(np.random.default_rng(1).integers(20, 90, (60, 80, 1), dtype=np.uint8), 3, 2)  # dark
    mild, strong = (
        np.stack([change(grey, np.random.default_rng(seed)).astype(float) for seed in range(200)])
        for change in (photometric, strong_photometric)
    )
    assert (strong.mean((1, 2, 3)) > 3).mean() > 0.95  # hardly any is black
    cast = [np.abs(p[..., 0].mean((1, 2)) - p[..., 2].mean((1, 2))).max() for p in (mild, strong)]
    uneven = [np.abs(p[:, :, :40].mean((1, 2, 3)) - p[:, :, 40:].mean((1, 2, 3))).max() for p in (mild, strong)]
    assert cast[0] < 1 < 5 < cast[1]  # grey stays grey but for another white balance
    assert uneven[0] < 5 < 10 < uneven[1]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_strong_changes(share: float, tmp_path: Path) -> None:
    """Of a grey image: those of the strong kind have another white balance."""
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
        shape = (64, 96) if folder == "trainannot" else (64, 96, 3)
        cv2.imwrite(str(tmp_path / folder / "a.png"), np.full(shape, 90 if len(shape) == 3 else 1, np.uint8))
    config = TrainConfig(data=tmp_path, output=tmp_path, crop=(64, 96), scale=(1, 1), strong_photometric=share)
    images = TrainImages(open_dataset("camvid", tmp_path, "train"), config)
    torch.manual_seed(0)
    casts = [
        abs(float(image[0].float().mean() - image[2].float().mean())) for image, _ in (images[0] for _ in range(20))
    ]
    assert (max(casts) > 5) == bool(share)  # grey stays grey but for another white balance


@pytest.mark.parametrize("scale", [(0.4, 0.6), (1.0, 1.0), (1.8, 2.2)])
def test_crops_around_a_class_hold_it(scale: tuple[float, float]) -> None:
    labels = np.zeros((120, 160), np.uint8)
    labels[100:106, 8:14] = 3
    labels[20:28, 120:128] = 5
    image = np.zeros((120, 160, 3), np.uint8)
    held = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        _, ids = random_scale_crop(image, labels, rng, crop=(32, 48), scale=scale, around=(3, 5, 7))
        assert {3, 5} & set(np.unique(ids))
        held |= {3, 5} & set(np.unique(ids))
    assert held == {3, 5}


def test_crops_around_a_class_that_is_not_there_are_like_any_other() -> None:
    labels = np.zeros((60, 80), np.uint8)
    image = np.arange(60 * 80 * 3, dtype=np.uint8).reshape(60, 80, 3)
    cuts = [
        random_scale_crop(image, labels, np.random.default_rng(4), crop=(32, 32), scale=(1.0, 1.0), around=around)[0]
        for around in ((), (3,))
    ]
    assert (cuts[0] == cuts[1]).all()


def test_rare_classes_are_those_far_below_an_equal_share(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    labels = np.full((40, 100), 255, np.uint8)
    for name, count in enumerate((1000, 900, 400, 100)):  # an equal share is 600, a quarter of it 150
        labels.reshape(-1)[1000 * name : 1000 * name + count] = name
    cv2.imwrite(str(tmp_path / "labels" / "a.png"), labels)
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.zeros((40, 100, 3), np.uint8))
    names = [{"name": name, "color": [i, i, i]} for i, name in enumerate("abcd")]
    (tmp_path / "classes.json").write_text(json.dumps(names))
    assert rare_classes(open_dataset("folder", tmp_path, "")).tolist() == [3]
