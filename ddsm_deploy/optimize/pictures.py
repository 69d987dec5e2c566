"""The images that a model is calibrated, searched and checked on.

They are chosen by their order alone, so the same folder gives the same ones anywhere; their fingerprint goes into
what is made from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ddsm_deploy.datasets import IGNORE, Dataset
from ddsm_deploy.errors import InputError
from ddsm_deploy.images import SUFFIXES, Labels, image_size, read_image
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec, sha256_of

FEWEST = 2
"""Below this a range is one picture's chance: an error."""

ADVISED = 32
"""Below this a warning: ranges of single layers still move with each image added."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image and, where there are labels, how to get them."""

    name: str
    path: Path
    labels: Callable[[], Labels] | None = None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images in a fixed order.

    Attributes:
        entries: the images.
        classes: names of the labels' classes, by id; empty without labels.
    """

    entries: tuple[Picture, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def spread(self, count: int) -> Pictures:
        """At most `count` of them, evenly spaced, the first and the last included."""
        picks = np.linspace(0, len(self.entries) - 1, min(count, len(self.entries))).round().astype(int)
        return dataclasses.replace(self, entries=tuple(self.entries[i] for i in picks))

    def without(self, others: Pictures) -> Pictures:
        """Those that are not among the others."""
        taken = {entry.path for entry in others.entries}
        return dataclasses.replace(self, entries=tuple(e for e in self.entries if e.path not in taken))

    def fingerprint(self) -> str:
        """Hex SHA-256 over the files' contents, in order; names and folders don't count."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(bytes.fromhex(sha256_of(entry.path)))
        return digest.hexdigest()


def from_dataset(dataset: Dataset) -> Pictures:
    """The images of a split, with their labels."""
    return Pictures(
        tuple(
            Picture(sample.image.name, sample.image, lambda index=index: dataset.labels(index))  # type: ignore[misc]
            for index, sample in enumerate(dataset.samples)
        ),
        dataset.classes.names,
    )


def from_folder(folder: str | Path) -> Pictures:
    """Every image of a folder and those below it, sorted; without labels.

    Raises:
        InputError: no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{folder}: no image there; looked for {' '.join(sorted(SUFFIXES))}")
    return Pictures(tuple(Picture(path.relative_to(folder).as_posix(), path) for path in found))


def check_pictures(pictures: Pictures, spec: ModelSpec) -> list[str]:
    """What is doubtful about calibrating a model on these images, a sentence each.

    Raises:
        InputError: fewer than `FEWEST`, or an image that can't be read.
    """
    count = len(pictures)
    if count < FEWEST:
        raise InputError(f"{count} image to calibrate on; expected at least {FEWEST}, better {ADVISED} or more")
    doubts = []
    if count < ADVISED:
        doubts.append(f"only {count} images to calibrate on; {ADVISED} or more give steadier ranges")
    sizes = [image_size(entry.path) for entry in pictures.entries]
    small = sum(height < spec.height and width < spec.width for height, width in sizes)
    if small:
        doubts.append(
            f"{small} of {count} images are smaller than the network's {spec.height}x{spec.width} and get enlarged: "
            "blurred images have other ranges than real ones"
        )
    wanted = spec.width / spec.height
    bent = sum(not 0.8 < (width / height) / wanted < 1.25 for height, width in sizes)
    if bent:
        doubts.append(
            f"{bent} of {count} images have another shape than the network's {spec.height}x{spec.width} and get "
            "stretched; calibrate on frames of the camera that the model will see"
        )
    return doubts


class Frames:
    """Images made ready for a network, kept in memory, with labels in the model's class ids where there are any."""

    def __init__(self, segmenter: Segmenter, pictures: Pictures) -> None:
        self.names = [entry.name for entry in pictures.entries]
        self.inputs = [segmenter.prepare(read_image(entry.path)) for entry in pictures.entries]
        self.labels = _labels(pictures, segmenter.spec.classes)


def _labels(pictures: Pictures, classes: Sequence[str]) -> list[Labels] | None:
    if not pictures.classes:
        return None
    if sorted(pictures.classes) != sorted(classes):
        raise InputError(
            f"the labels' {len(pictures.classes)} classes are not the model's {len(classes)}; "
            "calibrate on images alone, or on the data that the model was trained for"
        )
    table = np.full(256, IGNORE, dtype=np.uint8)
    table[: len(pictures.classes)] = [classes.index(name) for name in pictures.classes]
    return [table[entry.labels()] for entry in pictures.entries if entry.labels is not None]
