"""What every sink is, and the parts of which files are made that can't be appended to after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.streams.frames import Frame

PARTS_FOLDER = ".ddsm-parts"
"""In an output folder: what is not joined yet."""


class Sink(Protocol):
    """Takes a stream's results, in order, so that a killed run can go on.

    What is written becomes safe with `commit`; a run that goes on after a kill calls `restore` first, with what the
    last commit gave, and writes again what came after it.

    A sink whose settings decide which files it makes says so in an attribute `products`, one line: a run goes on only
    where an earlier one made the same.

    One that writes files names them, or their folders, in an attribute `targets`, paths: a run that would write over
    its source, or over what no run has made, is refused.

    Attributes:
        outputs: of the model, that this sink needs beside ``mask``.
    """

    outputs: tuple[str, ...]

    def encode(self, frame: Frame, result: Segmentation) -> Any:
        """What is to be written; called on several threads at once, in any order."""
        ...

    def write(self, frame: Frame, encoded: Any) -> None:
        """Writes what `encode` gave; called frame by frame, in order."""
        ...

    def commit(self) -> dict[str, Any]:
        """Makes all that was written safe against a kill; returns plain values from which `restore` goes on."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Throws away what was written after the commit that gave `state`; an empty one throws away everything."""
        ...

    def finish(self) -> None:
        """The stream has ended, and all is committed: makes the final files. May be repeated after a kill."""
        ...

    def close(self) -> None:
        """Gives back what is open, without making anything safe; again does nothing."""
        ...


class Parts:
    """Names and files of the parts of one output, each closed before it counts.

    Args:
        folder: for the parts; made where missing.
        suffix: of a part's file; empty where a part is a folder.
    """

    def __init__(self, folder: Path, suffix: str = "") -> None:
        self.folder = folder
        self._suffix = suffix
        self.names: list[str] = []

    @property
    def paths(self) -> list[Path]:
        """Of the parts that count, in order."""
        return [self.folder / name for name in self.names]

    def begin(self) -> Path:
        """The path for the next part, on which nothing is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{len(self.names):06d}{self._suffix}"
        _remove(path)
        return path

    def add(self, path: Path) -> None:
        """From now on, a part counts."""
        self.names.append(path.name)

    def restore(self, names: list[str]) -> None:
        """Only the parts named count; all else is deleted. Without the folder they were joined, and none is left."""
        _remove(self._done)
        self.names = list(names) if self.folder.is_dir() else []
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name not in names:
                    _remove(path)

    def clear(self) -> None:
        """Deletes the parts: all at once, or a kill would leave some that look like all."""
        self.names = []
        self.folder.rename(self._done)
        _remove(self._done)
        if not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()

    @property
    def _done(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.done")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
