"""Augmentation keeps image and labels together, and what lies outside the image is ignored."""

from __future__ import annotations

import numpy as np
import pytest

from ddsm_deploy.datasets import IGNORE
from ddsm_deploy.train.data import photometric, random_scale_crop


@pytest.mark.parametrize("scale", [(0.3, 0.5), (1.0, 1.0), (1.8, 2.2)])
def test_image_and_labels_move_together(scale: tuple[float, float]) -> None:
    # large squares whose grey value says their class: wherever the crop comes from, the two must still agree
    labels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((40, 40), np.uint8))
    image = np.repeat(labels[..., None] * 20, 3, axis=2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cut, ids = random_scale_crop(image, labels, rng, crop=(64, 96), scale=scale)
        assert cut.shape == (64, 96, 3) and ids.shape == (64, 96)
        inside = ids != IGNORE
        assert inside.any()
        agree = cut[..., 0][inside] == ids[inside] * 20
        assert agree.mean() > 0.85  # bilinear mixes neighbours along the squares' borders


def test_small_images_are_padded_with_ignored_grey() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    cut, ids = random_scale_crop(image, labels, np.random.default_rng(0), crop=(40, 40), scale=(1.0, 1.0))
    assert (ids == 0).sum() == 600 and (ids == IGNORE).sum() == 1000
    assert (cut[ids == IGNORE] == 127).all()


def test_photometric_changes_values_not_geometry() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = (40, 120, 200)
    changed = [photometric(image, rng) for _ in range(10)]
    assert all(c.shape == image.shape and c.dtype == np.uint8 for c in changed)
    assert len({c[16, 16].tobytes() for c in changed}) > 5
    for c in changed:  # the square stays the brighter part, where it was
        assert c[12:20, 12:20].mean() > c[:4].mean()
