"""Images to run a model on, in a fixed order, with labels where they come from a data set.

One kind of list for whatever compares, calibrates or checks: what is taken of a folder or a data set depends on the
order of the files alone, so it is the same anywhere, and its fingerprint tells two lists apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from ddsm_deploy.datasets import Dataset
from ddsm_deploy.errors import InputError
from ddsm_deploy.images import SUFFIXES, Labels
from ddsm_deploy.spec import sha256_of

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Frame:
    """One image.

    Attributes:
        name: its path below the folder that was named, or its file's name.
        path: its file.
        labels: gives its label map, uint8 H×W in the ids of `FrameList.classes`; None without labels.
    """

    name: str
    path: Path
    labels: Callable[[], Labels] | None = None


@dataclasses.dataclass(frozen=True)
class FrameList:
    """Images in a fixed order.

    Attributes:
        entries: the images.
        classes: names of the labels' classes, by id; empty without labels.
    """

    entries: tuple[Frame, ...]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Frame]:
        return iter(self.entries)

    def spread(self, count: int) -> FrameList:
        """At most `count` of them, evenly spaced, the first and the last included."""
        return dataclasses.replace(self, entries=evenly(self.entries, count))

    def without(self, others: FrameList) -> FrameList:
        """Those that are not among the others."""
        taken = {frame.path for frame in others}
        return dataclasses.replace(self, entries=tuple(frame for frame in self if frame.path not in taken))

    def fingerprint(self) -> str:
        """Hex SHA-256 over the files' contents, in order; names and folders don't count."""
        digest = hashlib.sha256()
        for frame in self:
            digest.update(bytes.fromhex(sha256_of(frame.path)))
        return digest.hexdigest()


def frames_of(dataset: Dataset, root: Path | None = None) -> FrameList:
    """The images of a split, with their labels; named by their path below `root`, or by their file's name."""
    entries = (
        Frame(
            sample.image.name if root is None else sample.image.relative_to(root).as_posix(),
            sample.image,
            lambda index=index: dataset.labels(index),  # type: ignore[misc]
        )
        for index, sample in enumerate(dataset.samples)
    )
    return FrameList(tuple(entries), dataset.classes.names)


def frames_in(source: str | Path) -> FrameList:
    """Every image of a folder and those below it, sorted, or the one image named; without labels.

    Raises:
        InputError: no such file or folder, or no image in it.
    """
    source = Path(source)
    try:
        if source.is_file():
            return FrameList((Frame(source.name, source),))
        if not source.exists():
            raise InputError(f"{source}: no such file or folder")
    except OSError as exc:
        raise InputError(f"{source}: can't be read ({exc.strerror or exc})") from exc
    return FrameList(tuple(Frame(path.relative_to(source).as_posix(), path) for path in images_in(source)))


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder and those below it, sorted.

    Raises:
        InputError: no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{folder}: no image there; looked for {' '.join(sorted(SUFFIXES))}")
    return found


def evenly(items: Sequence[Item], count: int) -> tuple[Item, ...]:
    """At most `count` of the items, evenly spaced, the first and the last included."""
    picks = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return tuple(items[i] for i in picks)
