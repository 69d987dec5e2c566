"""Where the weights of an ONNX file lie: in the file itself, or in files beside it that several ONNX files share.

A tensor can name a file, an offset and a length in place of its numbers (ONNX calls it external data). Each form is
made from the other by cutting and joining bytes, so the self-contained form of a file that was shared is, to the byte,
the file that it was before. Its sha256 therefore says which model a file is, wherever its weights lie. No ONNX package
is needed.

Source: onnx/onnx.proto (field numbers), onnx/docs/ExternalData.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.onnxfile import Walk, extent, walking
from ddsm_deploy.spec import sha256_of

MIN_SHARED = 1024
"""Bytes of a tensor that is worth a place outside: smaller ones stay in the graph."""

ALIGNMENT = 64
"""Tensors start at multiples of this, a cache line and the widest vector register, for runtimes that map the file."""

_NARROW = 4  # in a checkpoint, which packs tensors closely: the width of the widest type that weights have

_GRAPH, _INITIALIZER = 7, 5  # fields: of the model, of the graph
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # of a tensor
_BYTES = 2  # wire type


@dataclasses.dataclass(frozen=True)
class Region:
    """Bytes of a file, not read yet."""

    path: Path
    start: int
    length: int

    def read(self) -> bytes:
        """The bytes.

        Raises:
            OSError: the file can't be read, or ends before.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.length)
        if len(data) != self.length:
            raise OSError(None, "cut short while it was read", str(self.path))
        return data


Piece = bytes | Region


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A stored tensor: its message before and after its numbers, and where those are."""

    before: bytes
    data: Region
    after: bytes


@dataclasses.dataclass(frozen=True)
class Cut:
    """An ONNX file, cut where its weights are.

    Attributes:
        before: the model before its graph.
        graph: the graph's fields.
        after: the model after it.
        refers: some of the weights lie in other files.
    """

    before: bytes
    graph: tuple[bytes | Tensor, ...]
    after: bytes
    refers: bool

    def pieces(self, place: Callable[[Region], list[Piece]]) -> list[Piece]:
        """The file's bytes again, with the fields of each tensor's data as `place` makes them."""
        fields: list[Piece] = []
        for part in self.graph:
            if isinstance(part, bytes):
                fields.append(part)
            else:
                fields += _field(_INITIALIZER, part.before, *place(part.data), part.after)
        return [self.before, *_field(_GRAPH, *fields), self.after]


def cut(path: str | Path) -> Cut:
    """Cuts an ONNX file at its initializers of `MIN_SHARED` bytes or more, and at all that lie in other files.

    Raises:
        ArtifactError: as `onnxfile.read_metadata`; or other tensors than initializers lie in other files.
    """
    with walking(path) as walk:
        spans = list(_spans(walk, 0, len(walk.data)))
        graphs = [span for span in spans if span.field == _GRAPH]
        if len(graphs) != 1:
            raise ArtifactError(f"{path}: damaged ({len(graphs)} graphs; expected one)")
        graph = graphs[0]
        parts: list[bytes | Tensor] = []
        for span in _spans(walk, graph.first, graph.last):
            tensor = _tensor(walk, span) if span.field == _INITIALIZER else None
            parts.append(walk.data[span.at : span.last] if tensor is None else tensor)
        outside = sum(isinstance(part, Tensor) and part.data.path != walk.path for part in parts)
        if outside != walk.outside:
            raise ArtifactError(
                f"{path}: of the tensors that lie in {', '.join(sorted(walk.external))} some are no initializers of "
                "its graph; expected a file as `ddsm bundle` writes it"
            )
        return Cut(walk.data[: graph.at], tuple(parts), walk.data[graph.last :], refers=bool(outside))


def read_whole(path: str | Path) -> bytes:
    """A model's file; of an ONNX file its self-contained form.

    Raises:
        ArtifactError: as `cut`.
        OSError: a file can't be read.
    """
    found = _referring(path)
    return Path(path).read_bytes() if found is None else b"".join(_whole(found))


def copy_whole(source: str | Path, target: str | Path) -> None:
    """Copies a model's file; an ONNX file becomes self-contained.

    Raises:
        ArtifactError: as `cut`.
        OSError: a file can't be read or written.
    """
    if (found := _referring(source)) is None:
        shutil.copyfile(source, target)
        return
    with Path(target).open("wb") as file:
        file.writelines(_whole(found))


def model_sha256(path: str | Path) -> str:
    """Which model a file of any kind is: its sha256, and that of the self-contained form where it is an ONNX file.

    Raises:
        ArtifactError: as `cut`.
        OSError: a file can't be read.
    """
    if (found := _referring(path)) is None:
        return sha256_of(path)
    digest = hashlib.sha256()
    for data in _whole(found):
        digest.update(data)
    return digest.hexdigest()


def checkpoint_regions(path: Path) -> list[Region]:
    """Where the tensors of a sound safetensors file lie."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    extents = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return [Region(path, 8 + length + first, last - first) for first, last in extents]


class SharedWeights:
    """Writes one file that holds the weights of several ONNX files, each tensor once.

    Equal files, added in the same order, give equal bytes. Where no tensor is large enough there is no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, tuple[str, int]] = {}  # sha256 of the data -> file, offset

    def lend(self, name: str, regions: Iterable[Region]) -> None:
        """Lets tensors lie in another file of the folder, `name`, where it holds the same bytes."""
        for region in regions:
            if region.length >= MIN_SHARED and region.start % _NARROW == 0:
                self._places.setdefault(hashlib.sha256(region.read()).digest(), (name, region.start))

    def add(self, source: Path, target: Path) -> None:
        """Writes `source`, an ONNX file, to `target`, with its weights in the shared file, which must be beside it.

        Raises:
            ArtifactError: as `cut`.
            OSError: a file can't be read or written.
        """
        pieces = cut(source).pieces(self._place)
        with target.open("wb") as file:
            file.writelines(_read(pieces))

    def _place(self, region: Region) -> list[Piece]:
        if region.length < MIN_SHARED:
            return _inside(region)
        data = region.read()
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._places[key] = (self.path.name, self._append(data))
        location, offset = self._places[key]
        entries = {"location": location, "offset": str(offset), "length": str(region.length)}
        fields = [_field(_EXTERNAL_DATA, *_entry(key, value)) for key, value in entries.items()]
        return [piece for field in fields for piece in field] + [_varint(_DATA_LOCATION << 3) + _varint(1)]

    def _append(self, data: bytes) -> int:
        with self.path.open("ab") as file:
            file.write(bytes(-file.tell() % ALIGNMENT))
            offset = file.tell()
            file.write(data)
        return offset


def _referring(path: str | Path) -> Cut | None:
    """The file where it is an ONNX file whose weights lie elsewhere."""
    found = cut(path) if Path(path).suffix.lower() == ".onnx" else None
    return found if found is not None and found.refers else None


def _whole(found: Cut) -> Iterator[bytes]:
    return _read(found.pieces(_inside))


def _read(pieces: Iterable[Piece]) -> Iterator[bytes]:
    return (piece if isinstance(piece, bytes) else piece.read() for piece in pieces)


class _Span(NamedTuple):
    """One field in the file: its number, where its tag begins, its first byte and the one past its last."""

    field: int
    at: int
    first: int
    last: int


def _spans(walk: Walk, start: int, end: int) -> Iterator[_Span]:
    at = start
    for field, _, first, last in walk.fields(start, end):
        yield _Span(field, at, first, last)
        at = last


def _tensor(walk: Walk, span: _Span) -> Tensor | None:
    """A tensor whose data can be moved; None where it stays as it is."""
    spans = list(_spans(walk, span.first, span.last))
    entries = dict(walk.entry(s.first, s.last) for s in spans if s.field == _EXTERNAL_DATA)
    raw = [s for s in spans if s.field == _RAW_DATA]
    if entries:
        moved = [s for s in spans if s.field in (_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION)]
        path = walk.path.parent / entries["location"]
        start, length = extent(walk.path, entries)
        region = Region(path, start, length if "length" in entries else path.stat().st_size - start)
    elif len(raw) == 1 and raw[0].last - raw[0].first >= MIN_SHARED and _DATA_LOCATION not in {s.field for s in spans}:
        moved = raw
        region = Region(walk.path, raw[0].first, raw[0].last - raw[0].first)
    else:
        return None
    first = moved[0]
    after = b"".join(walk.data[s.at : s.last] for s in spans if s.at > first.at and s not in moved)
    return Tensor(walk.data[span.first : first.at], region, after)


def _inside(region: Region) -> list[Piece]:
    return _field(_RAW_DATA, region)


def _entry(key: str, value: str) -> list[Piece]:
    return [*_field(1, key.encode()), *_field(2, value.encode())]


def _field(number: int, *content: Piece) -> list[Piece]:
    length = sum(len(piece) if isinstance(piece, bytes) else piece.length for piece in content)
    return [_varint(number << 3 | _BYTES) + _varint(length), *content]


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
