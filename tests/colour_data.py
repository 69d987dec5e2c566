"""Labelled data for the model of `colour_graph`: images on which its mask is known to the pixel."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
from colour_graph import CLASSES

from ddsm_deploy.datasets import IGNORE

COUNT = 5


def random_map(seed: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    """Class ids 0 to 2 in blocks of 8×8 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 3, (size[0] // 8, size[1] // 8), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8), dtype=np.uint8))


def write_pair(root: Path, name: str, seen: np.ndarray, truth: np.ndarray) -> None:
    """An image on which the model gives the mask `seen`, and the label map `truth`."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    bgr = np.zeros((*seen.shape, 3), dtype=np.uint8)
    for identity, channel in enumerate((2, 1, 0)):
        bgr[seen == identity, channel] = 200
    assert cv2.imwrite(str(root / "images" / f"{name}.png"), bgr)
    PIL.Image.fromarray(truth).save(root / "labels" / f"{name}.png")


def write_classes(root: Path, names: tuple[str, ...] = CLASSES, values: tuple[int, ...] | None = None) -> None:
    """The class file of a `folder` data set."""
    entries = [{"name": name, "value": value} for name, value in zip(names, values or range(len(names)), strict=True)]
    (root / "classes.json").write_text(json.dumps(entries), encoding="utf-8")


def write_colour_data(root: Path) -> Path:
    """`COUNT` pairs whose truth differs from what the model gives in half of the blocks; the top blocks are void."""
    for index in range(COUNT):
        seen, truth = random_map(index), random_map(100 + index)
        truth[:, 48:] = seen[:, 48:]
        truth[:8] = IGNORE
        write_pair(root, f"{index}", seen, truth)
    write_classes(root)
    return root


def expected_iou(root: Path) -> list[float]:
    """IoU of each class in per cent, counted from the pairs of `write_colour_data` class by class."""
    hits, unions = np.zeros(3), np.zeros(3)
    for index in range(COUNT):
        seen, truth = random_map(index), np.array(PIL.Image.open(root / "labels" / f"{index}.png"))
        known = truth != IGNORE
        for identity in range(3):
            hits[identity] += ((seen == identity) & (truth == identity) & known).sum()
            unions[identity] += (((seen == identity) | (truth == identity)) & known).sum()
    return [*(100 * hits / unions)]
