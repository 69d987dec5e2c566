"""Training data: files to augmented tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ddsm_deploy.datasets import Dataset
from ddsm_deploy.errors import InputError
from ddsm_deploy.images import read_image
from ddsm_deploy.train.config import TrainConfig

Pixels = npt.NDArray[np.uint8]

PADDING = -1
"""Label of what no image covers: ignored, as what has no label is, and not shown to a teacher's judgement either."""


class TrainImages(TorchDataset[tuple[Tensor, Tensor]]):
    """Random scale, crop, flip and photometric changes. Items: image uint8 3×H×W (RGB), labels int64 H×W: class ids,
    `ddsm_deploy.datasets.IGNORE` or `PADDING`."""

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        self.dataset = dataset
        self.config = config
        self.rare = rare_classes(dataset) if config.rare_crops else np.zeros(0, np.uint8)

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = _read(self.dataset, index)
        # torch's generator is the one that DataLoader seeds in each worker and epoch
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        around = self.rare if rng.random() < self.config.rare_crops else ()
        image, labels = random_scale_crop(
            image, labels, rng, crop=self.config.crop, scale=self.config.scale, around=around
        )
        if rng.random() < 0.5:
            image, labels = image[:, ::-1], labels[:, ::-1]
        change = strong_photometric if rng.random() < self.config.strong_photometric else photometric
        return _tensors(change(image, rng), labels)


class EvalImages(TorchDataset[tuple[Tensor, Tensor]]):
    """Whole images at the deployed size, unchanged. Items as in `TrainImages`."""

    def __init__(self, dataset: Dataset, config: TrainConfig) -> None:
        self.dataset = dataset
        self.size = (config.width, config.height)

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, labels = _read(self.dataset, index)
        image = cv2.resize(image, self.size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, self.size, interpolation=cv2.INTER_NEAREST_EXACT)
        return _tensors(image, labels)


def random_scale_crop(
    image: Pixels,
    labels: Pixels,
    rng: np.random.Generator,
    *,
    crop: tuple[int, int],
    scale: tuple[float, float],
    around: Sequence[int] | Pixels = (),
) -> tuple[Pixels, npt.NDArray[np.int16]]:
    """Scales by a random factor and cuts a random window of `crop` rows and columns; what lies outside is grey, and its
    label `PADDING`.

    With class ids in `around`, the window holds some pixel of one of them that occurs, each as likely as the others.
    """
    factor = float(np.exp(rng.uniform(np.log(scale[0]), np.log(scale[1]))))
    height, width = (max(1, round(side * factor)) for side in labels.shape)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    ids = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int16)
    rows, columns = crop
    pad_y, pad_x = max(0, rows - height), max(0, columns - width)
    if pad_y or pad_x:
        above, left = int(rng.integers(pad_y + 1)), int(rng.integers(pad_x + 1))
        border = (above, pad_y - above, left, pad_x - left, cv2.BORDER_CONSTANT)
        image = cv2.copyMakeBorder(image, *border, value=(127, 127, 127))
        ids = cv2.copyMakeBorder(ids, *border, value=PADDING)
    last = (ids.shape[0] - rows, ids.shape[1] - columns)
    occurring = np.intersect1d(around, np.unique(ids))
    if occurring.size:
        pixel = rng.choice(np.flatnonzero(ids == rng.choice(occurring)))
        places = zip(np.unravel_index(pixel, ids.shape), crop, last, strict=True)
        top, left = (int(rng.integers(max(0, at - side + 1), min(at, end) + 1)) for at, side, end in places)
    else:
        top, left = (int(rng.integers(end + 1)) for end in last)
    window = np.s_[top : top + rows, left : left + columns]
    return image[window], ids[window]


def photometric(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Random brightness, contrast, gamma, saturation, hue and slight blur of a uint8 BGR image."""
    levels = np.arange(256, dtype=np.float32) / 255
    levels = levels ** float(rng.uniform(0.65, 1.5))
    levels = (levels - 0.5) * float(rng.uniform(0.75, 1.3)) + 0.5 + float(rng.uniform(-0.12, 0.12))
    image = cv2.LUT(np.ascontiguousarray(image), (levels.clip(0, 1) * 255).astype(np.uint8))
    image = _shift_colours(image, hue=float(rng.uniform(-6, 6)), saturation=float(rng.uniform(0.6, 1.4)))
    if rng.random() < 0.2:
        image = cv2.GaussianBlur(image, (3, 3), 0)
    return image


def strong_photometric(image: Pixels, rng: np.random.Generator) -> Pixels:
    """As if taken at another time of day, in other weather or by another camera: uint8 BGR.

    Gamma, contrast and brightness, white balance, hue and saturation (sometimes grey), light that differs over the
    picture, a shadow with one edge, blur or noise.
    """
    levels = np.arange(256, dtype=np.float32)[:, None] / 255
    levels = levels ** _log_uniform(rng, 0.5, 2)
    # about the picture's own mean: about the middle, dark pictures would turn black
    mean = float(levels[:, 0][image[::4, ::4]].mean())
    levels = (levels - mean) * float(rng.uniform(0.65, 1.35)) + mean * _log_uniform(rng, 0.7, 1.4)
    levels = levels * rng.uniform(0.85, 1.15, (1, 3))
    image = cv2.LUT(np.ascontiguousarray(image), (levels.clip(0, 1) * 255).astype(np.uint8)[None])
    image = _shift_colours(image, hue=float(rng.uniform(-10, 10)), saturation=_strong_saturation(rng))
    light = _uneven_light(image.shape[:2], rng)
    if light is not None:
        image = (image * light[..., None]).clip(0, 255).astype(np.uint8)
    draw = rng.random()
    if draw < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.2)))
    elif draw < 0.35:
        noise = rng.normal(0, rng.uniform(1, 7), image.shape)
        image = (image + noise).clip(0, 255).astype(np.uint8)
    return image


def _strong_saturation(rng: np.random.Generator) -> float:
    return 0.0 if rng.random() < 0.1 else float(rng.uniform(0.4, 1.6))


def _uneven_light(size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.float32] | None:
    """Factors H×W: light that changes smoothly, and a shadow on one side of a line; None where there is neither."""
    rows, columns = size
    light: npt.NDArray[np.float32] | None = None
    if rng.random() < 0.4:
        corners = np.exp(rng.uniform(np.log(0.45), np.log(1.4), (3, 4))).astype(np.float32)
        light = cv2.resize(corners, (columns, rows), interpolation=cv2.INTER_CUBIC).astype(np.float32, copy=False)
    if rng.random() < 0.3:
        angle, (row, column) = rng.uniform(0, 2 * np.pi), rng.uniform(0, size)
        y, x = np.ogrid[:rows, :columns]
        within = (y - row) * np.sin(angle) + (x - column) * np.cos(angle)  # pixels beyond the line
        share = 1 / (1 + np.exp(-(within / rng.uniform(1, 12)).clip(-30, 30)))
        shadow = (1 - (1 - rng.uniform(0.35, 0.8)) * share).astype(np.float32)
        light = shadow if light is None else light * shadow
    return light


def _shift_colours(image: Pixels, *, hue: float, saturation: float) -> Pixels:
    """`hue` is added, in OpenCV's half degrees; `saturation` multiplies."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    ramp = np.arange(256, dtype=np.float32)
    hues = ((ramp + hue) % 180).astype(np.uint8)
    saturations = (ramp * saturation).clip(0, 255).astype(np.uint8)
    hsv = cv2.LUT(hsv, np.stack([hues, saturations, np.arange(256, dtype=np.uint8)], 1)[None])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR).astype(np.uint8, copy=False)


def _log_uniform(rng: np.random.Generator, least: float, greatest: float) -> float:
    return float(np.exp(rng.uniform(np.log(least), np.log(greatest))))


def class_weights(dataset: Dataset) -> npt.NDArray[np.float32]:
    """Square root of (median frequency / own frequency) per class, within 0.5 and 3; absent classes weigh 1."""
    count = pixels_of(dataset)
    present = count > 0
    weights = np.ones(len(count), dtype=np.float32)
    weights[present] = np.sqrt(np.median(count[present]) / count[present]).clip(0.5, 3)
    return weights


def rare_classes(dataset: Dataset) -> Pixels:
    """Ids of the classes with less than a quarter of the pixels that each would have if all had the same."""
    count = pixels_of(dataset)
    return np.flatnonzero(count * 4 * len(count) < count.sum()).astype(np.uint8)


def pixels_of(dataset: Dataset) -> npt.NDArray[np.int64]:
    """Labelled pixels of each class.

    Raises:
        InputError: there are none, or labels can't be read.
    """
    count = np.zeros(256, dtype=np.int64)
    for index in range(len(dataset.samples)):
        count += np.bincount(dataset.labels(index).ravel(), minlength=256)
    count = count[: len(dataset.classes.names)]
    if not count.any():
        raise InputError(f"split {dataset.split!r} has no labelled pixel")
    return count


def _read(dataset: Dataset, index: int) -> tuple[Pixels, Pixels]:
    sample = dataset.samples[index]
    image, labels = read_image(sample.image), dataset.labels(index)
    if image.shape[:2] != labels.shape:
        raise InputError(f"{sample.labels}: labels are {labels.shape}, but the image is {image.shape[:2]}")
    return image, labels


def _tensors(image: Pixels, labels: npt.NDArray[Any]) -> tuple[Tensor, Tensor]:
    rgb = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    return torch.from_numpy(rgb), torch.from_numpy(labels.astype(np.int64))
