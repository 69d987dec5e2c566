"""Where inputs and outputs lie: a folder of this machine, or what pyarrow reaches under a URI.

Paths without a scheme and ``file://`` are folders of this machine; there the local engine's own rules for finding,
reading and writing hold. Everything else is a path in a `pyarrow.fs.FileSystem`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote, urlsplit

from ddsm_deploy.errors import BackendMissing, ConfigError, InputError
from ddsm_deploy.runtime.outputs import temporary_name

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_WHOLE_BY_NATURE = ("s3", "gcs", "abfs")
"""File systems (pyarrow's names) in which an object appears when its upload has ended; elsewhere files are renamed."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder, a file or a glob, on this machine or elsewhere.

    Attributes:
        path: on this machine as a path; elsewhere as its file system has it, such as ``bucket/day1``.
        scheme: of the URI, such as ``s3``; empty on this machine.
        filesystem: that `path` belongs to; None on this machine.
    """

    path: str
    scheme: str = ""
    filesystem: FileSystem | None = None

    @classmethod
    def of(cls, text: str) -> Self:
        """What a word on the command line stands for; nothing is asked of any server yet.

        Raises:
            InputError: no URI that pyarrow understands.
            BackendMissing: pyarrow is not installed.
        """
        if not (match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", text)):
            return cls(text)
        scheme = match[1].lower()
        if scheme == "file":
            return cls(unquote(urlsplit(text).path))
        pyarrow = import_pyarrow()
        from pyarrow.fs import FileSystem

        bare, question, query = text.partition("?")
        folder = folder_of_glob(bare)  # whose own characters are not for URIs
        try:
            filesystem, path = FileSystem.from_uri(folder + question + query)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError, ValueError) as exc:
            raise InputError(f"{shown(text)}: no place that pyarrow can reach ({_one_line(exc)})") from exc
        return cls(path.rstrip("/") + bare.removeprefix(folder), scheme, filesystem)

    @property
    def local(self) -> bool:
        """Whether it lies on this machine, or in a folder that is mounted on all of them."""
        return self.filesystem is None

    def __str__(self) -> str:
        return self.named(self.path)

    def named(self, path: str) -> str:
        """A path of the same file system as people and the manifest name it: without secrets and server addresses."""
        return f"{self.scheme}://{path}" if self.scheme else path

    def below(self, relative: str) -> Self:
        """A place inside this one."""
        return dataclasses.replace(self, path=f"{self.path.rstrip('/')}/{relative}")

    def read(self) -> bytes:
        """A file's content.

        Raises:
            OSError: it can't be read.
        """
        assert self.filesystem is not None
        with self.filesystem.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files (relative path -> bytes) inside this place, each whole or not at all.

        Raises:
            OSError: they can't be written.
        """
        assert self.filesystem is not None
        for relative, data in files.items():
            target = PurePosixPath(self.path, relative)
            if self.filesystem.type_name in _WHOLE_BY_NATURE:
                _put(self.filesystem, str(target), data)
                continue
            self.filesystem.create_dir(str(target.parent), recursive=True)
            temporary = str(target.with_name(temporary_name()))
            _put(self.filesystem, temporary, data)
            self.filesystem.move(temporary, str(target))


def common_place(places: Sequence[Place]) -> Place:
    """One of `places`, for its file system; all must share it.

    Raises:
        ConfigError: they lie in several.
    """
    first = places[0]
    for place in places:
        same = place.filesystem is first.filesystem or (place.filesystem and place.filesystem.equals(first.filesystem))
        if not same:
            raise ConfigError(f"{first} and {place} lie in different file systems; segment them one after the other")
    return first


def folder_of_glob(text: str) -> str:
    """The part of a path before the first name with a ``*`` or ``[``; all of it where there is none."""
    magic = re.search(r"[*\[]", text)
    return text[: text.rindex("/", 0, magic.start())] if magic else text


def shown(text: str) -> str:
    """A URI without its credentials and its query, which may hold secrets."""
    return re.sub(r"//[^/@]*@", "//", text.partition("?")[0])


@contextlib.contextmanager
def reaching(place: Place) -> Iterator[None]:
    """Turns what a file system says into one line that names the place.

    Raises:
        InputError: it said something.
    """
    try:
        yield
    except OSError as exc:
        raise InputError(f"{place}: {_one_line(exc)}") from exc


def import_pyarrow() -> Any:
    """The module pyarrow.

    Raises:
        BackendMissing: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.fs
    except ImportError as exc:
        raise BackendMissing("pyarrow", extra="ray", why=str(exc)) from exc
    return pyarrow


def _put(filesystem: FileSystem, path: str, data: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc.strerror if isinstance(exc, OSError) and exc.strerror else exc).split())


def local_path(place: Place) -> Path:
    """A place of this machine as an absolute path, as workers in other folders find it."""
    return Path(os.path.abspath(place.path))  # noqa: PTH100 # as `find_sources` makes them: links stay
