# ruff: noqa: PTH118, PTH120, PTH122
# Paths are plain strings here: a listing may hold a million of them.
"""Images in a folder and below it, without what earlier runs wrote there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

from ddsm_deploy.images import SUFFIXES

MANIFEST_NAME = "ddsm-manifest.jsonl"
"""The manifest in an output folder: a folder that holds one is an output folder and yields no input."""

JOURNAL_NAME = "ddsm-stream.json"
"""The same for a stream's output folder."""

PRODUCT_FOLDERS = ("masks", "color", "overlay", "confidence", "polygons")
"""Folders that a run makes in its output folder, one a product."""


NOT_OURS = "is there already, and no record tells of a run that made it; take another output folder, or --overwrite"
"""What is said of a file in an output folder that would be written over."""


def walk(root: str, is_output: Callable[[str], bool]) -> Iterator[str]:
    """Paths of the images below a folder; hidden entries, links to folders and those of `is_output` are passed over."""
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and not is_output(os.path.join(folder, name))]
        for name in files:
            if name[0] != "." and is_image(name):
                yield os.path.join(folder, name)


def output_test(base: str, own: str = "") -> Callable[[str], bool]:
    """A test whether a folder is, or lies in, an output folder of this run or of another one below `base`."""

    @functools.cache
    def is_output(folder: str) -> bool:
        if folder == base or len(folder) < len(base):
            return False
        real = os.path.realpath(folder)
        parent, name = os.path.split(real)
        if real == own or (parent == own and name in PRODUCT_FOLDERS):
            return True
        records = (os.path.join(folder, name) for name in (MANIFEST_NAME, JOURNAL_NAME))
        return any(map(os.path.exists, records)) or is_output(os.path.dirname(folder))

    return is_output


def is_image(name: str) -> bool:
    """Whether a file's name ends as an image's does."""
    return os.path.splitext(name)[1].lower() in SUFFIXES
