# ruff: noqa: PTH100, PTH112, PTH120, PTH122, PTH207
# Paths are plain strings here: a listing may hold a million of them.
"""Which images a batch run reads, in a fixed order, and what their outputs are called.

Names follow two rules that depend on the set of inputs alone, never on the order in which they were given or found:

1. Outputs keep the folder structure below the deepest folder that holds all the SOURCEs. So ``day1 day2`` gives
   ``day1/0001`` and ``day2/0001``, and ``day1`` alone gives ``0001``.
2. An output is named by its input without the suffix: ``a.png`` gives ``a``. Inputs that would share a name (``a.png``
   beside ``a.jpg``) all keep their suffix: ``a.png`` and ``a.jpg``.
"""

from __future__ import annotations

import collections
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ddsm_deploy.errors import InputError
from ddsm_deploy.images import SUFFIXES
from ddsm_deploy.listing import is_image, output_test, walk

MAX_NAME_BYTES = 240
"""File systems allow 255 bytes a name; the rest is for the longest suffix of an output."""


class Source(NamedTuple):
    """One input: its absolute path, and its outputs' name (relative, with ``/``, without the product's suffix)."""

    path: str
    name: str


def find_sources(sources: Sequence[str | Path], output: Path) -> list[Source]:
    """Lists the images that `sources` stand for, sorted by path, each once.

    Args:
        sources: files (taken whatever their suffix), folders (walked recursively for image suffixes; hidden entries,
            output folders and links to folders are passed over), and glob patterns, ``**`` included.
        output: the run's own output folder; the products in it are never inputs.

    Raises:
        InputError: a source does not exist, or holds no image.
    """
    if not sources:
        raise InputError("no source given; expected files, folders or globs")
    own = os.path.realpath(output)
    bases: list[str] = []
    found: set[str] = set()
    for source in sources:
        base, paths = _expand(os.fspath(source), own)
        if not paths:
            raise InputError(f"{source}: no image there; looked for {' '.join(sorted(SUFFIXES))}")
        bases.append(base)
        found.update(paths)
    ordered = sorted(found)
    names = names_below(ordered, os.path.commonpath(bases))
    return [Source(path, name) for path, name in zip(ordered, names, strict=True)]


def _expand(text: str, own: str) -> tuple[str, list[str]]:
    """The folder from which a source's structure counts, and the absolute paths of its images."""
    path = os.path.abspath(text)
    if os.path.isdir(path):
        return path, list(walk(path, output_test(path, own)))
    if os.path.lexists(path):
        return os.path.dirname(path), [path]
    if not glob.has_magic(text):
        raise InputError(f"{text}: no such file or folder")
    base = path
    while glob.has_magic(base):
        base = os.path.dirname(base)
    return base, list(_matches(path, output_test(base, own)))


def _matches(pattern: str, is_output: Callable[[str], bool]) -> Iterator[str]:
    for match in glob.iglob(pattern, recursive=True):
        if os.path.isdir(match):
            if not is_output(os.path.abspath(match)):
                yield from walk(os.path.abspath(match), is_output)
        elif is_image(match) and not is_output(os.path.dirname(match)):
            yield os.path.abspath(match)


def names_below(paths: Sequence[str], common: str) -> list[str]:
    """The outputs' names of inputs, all of them below the folder `common`."""
    start = len(common.rstrip(os.sep)) + 1
    full = [_shortened(path[start:].replace(os.sep, "/")) for path in paths]
    names = [_shortened(os.path.splitext(path[start:])[0].replace(os.sep, "/")) for path in paths]
    while True:
        counts = collections.Counter(names)
        clashing = [i for i, name in enumerate(names) if counts[name] > 1 and name != full[i]]
        if not clashing:
            return names
        for index in clashing:
            names[index] = full[index]


def _shortened(name: str) -> str:
    """`name` with its last part cut to what a file system takes, made distinct by a digest of all of it."""
    folder, _, last = name.rpartition("/")
    if len(os.fsencode(last)) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(os.fsencode(last)).hexdigest()[:16]
    kept = os.fsencode(last)[: MAX_NAME_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    return f"{folder}/{kept}~{digest}" if folder else f"{kept}~{digest}"
