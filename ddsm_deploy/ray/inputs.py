"""Which images a run on Ray reads: by the local engine's rules, in whatever file system they lie."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ddsm_deploy.errors import InputError
from ddsm_deploy.images import SUFFIXES
from ddsm_deploy.listing import JOURNAL_NAME, MANIFEST_NAME, PRODUCT_FOLDERS, is_image
from ddsm_deploy.ray.places import Place, common_place, folder_of_glob, local_path, reaching
from ddsm_deploy.runtime.manifest import Finished
from ddsm_deploy.runtime.sources import Source, find_sources, names_below

State = tuple[int, int]
"""A file's size in bytes, and its time of change in nanoseconds."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        place: for its file system.
        sources: in the order of their paths.
        states: path -> state when it was listed; empty on this machine, where looking is cheap.
    """

    place: Place
    sources: list[Source]
    states: Mapping[str, State]

    def finished(self, source: Source) -> Finished | None:
        """The record of a run that made its outputs from the file as it is now; None where it is gone."""
        if not self.place.local:
            return Finished(source.name, *self.states[source.path])
        try:
            status = Path(source.path).stat()
        except OSError:
            return None
        return Finished(source.name, status.st_size, status.st_mtime_ns)


def find_inputs(words: Sequence[str], output: Place) -> Inputs:
    """Lists the images that `words` stand for: files, folders and globs, as paths or as URIs of one file system.

    Args:
        words: see `find_sources`, whose rules hold for URIs too; there ``?`` begins the query and is no wildcard.
        output: the run's own; what is in it is never an input.

    Raises:
        InputError: there is no such place, it can't be read, or holds no image.
        ConfigError: the words are of several file systems.
    """
    if not words:
        raise InputError("no source given; expected files, folders or globs, as paths or URIs")
    places = [Place.of(word) for word in words]
    common = common_place(places)
    if common.local:
        own = local_path(output) if output.local else Path(os.devnull)
        return Inputs(common, find_sources([place.path for place in places], own), {})
    states: dict[str, State] = {}
    bases = []
    for place in places:
        with reaching(place):
            base, found = _expand(place, output)
        if not found:
            raise InputError(f"{place}: no image there; looked for {' '.join(sorted(SUFFIXES))}")
        bases.append(base)
        states |= found
    ordered = sorted(states)
    names = names_below(ordered, os.path.commonpath(bases))
    sources = [Source(common.named(path), name) for path, name in zip(ordered, names, strict=True)]
    return Inputs(common, sources, {common.named(path): state for path, state in states.items()})


def _expand(place: Place, output: Place) -> tuple[str, dict[str, State]]:
    """The folder from which a place's structure counts, and its images with their states."""
    from pyarrow.fs import FileType

    assert place.filesystem is not None
    base = folder_of_glob(place.path)
    if base != place.path:
        from fsspec.utils import glob_translate

        pattern = re.compile(glob_translate(place.path))
        return base, {path: state for path, state in _walk(place, base, output) if _matches(pattern, path, base)}
    info = place.filesystem.get_file_info(place.path)
    if info.type == FileType.NotFound:
        raise InputError(f"{place}: no such file or folder")
    if info.type == FileType.File:
        return str(PurePosixPath(place.path).parent), {place.path: (info.size, info.mtime_ns or 0)}
    return place.path, dict(_walk(place, place.path, output))


def _walk(place: Place, base: str, output: Place) -> Iterator[tuple[str, State]]:
    from pyarrow.fs import FileSelector, FileType

    assert place.filesystem is not None
    listed = place.filesystem.get_file_info(FileSelector(base, recursive=True))
    files = [(info.path, (info.size, info.mtime_ns or 0)) for info in listed if info.type == FileType.File]
    start = len(base.rstrip("/")) + 1
    outputs = {f"{output.path}/{folder}" for folder in PRODUCT_FOLDERS} if output.scheme == place.scheme else set()
    outputs |= {
        path.rpartition("/")[0] for path, _ in files if path.endswith((f"/{MANIFEST_NAME}", f"/{JOURNAL_NAME}"))
    }
    outputs.discard(base.rstrip("/"))  # a folder that is asked for by name is read, as on this machine
    for path, state in files:
        inner = path[start:].split("/")
        hidden = any(part.startswith(".") for part in inner)
        if is_image(path) and not hidden and outputs.isdisjoint(_folders(path, start)):
            yield path, state


def _folders(path: str, start: int) -> Iterator[str]:
    """The folders of a path, from the one that begins at `start` on."""
    for match in re.finditer("/", path[start:]):
        yield path[: start + match.start()]


def _matches(pattern: re.Pattern[str], path: str, base: str) -> bool:
    """Whether a pattern matches a file, or a folder that it lies in."""
    start = len(base.rstrip("/")) + 1
    return any(map(pattern.match, (path, *_folders(path, start))))
