"""Reading the outside of an ONNX file without any ONNX library: its metadata, its opset, and where its weights lie.

An ONNX file is one protobuf message. Its top level, and the few branches that can name files outside it, are walked
here field by field; tensors are stepped over, not read. So a damaged or foreign file, and one that reaches for files
outside its folder, is refused in one line before a runtime with native code sees a byte of it.

Source: onnx/onnx.proto (field numbers), protobuf.dev/programming-guides/encoding (the wire format).
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.spec import METADATA_KEY, ModelSpec

SAMPLING_DOMAIN, SAMPLING_OP = "ddsm", "DynamicSampleAttention"
"""The node of a fused file: its operator set, and its name there (see `export.sampling_function`)."""

MAX_FIELDS = 300_000
"""Fields walked before a file is refused: thirty times what the default network has, and a bound on the time taken."""

MAX_DEPTH = 32
"""Levels of nesting walked: control flow inside control flow needs a handful."""

_BYTES = 2  # wire type of texts, tensors and nested messages

# What is walked: message -> field number -> message. Besides the metadata these are the places where a tensor can be,
# and so a reference to an external file; an "entry" is a pair of texts.
_BRANCHES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 14: "entry", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_IR_VERSION, _GRAPH, _OPSET_IMPORT = 1, 7, 8  # fields of the model


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a deployed model.

    Raises:
        ArtifactError: as `read_metadata`, or the file was not made by ``ddsm export``.
    """
    return read_outline(path)[0]


def read_outline(path: str | Path) -> tuple[ModelSpec, tuple[str, ...]]:
    """The spec of a deployed model, and what `external_files` gives, in one walk.

    Raises:
        ArtifactError: as `read_spec`.
    """
    with walking(path) as walk:
        metadata, external = walk.entries, tuple(sorted(walk.external))
    if METADATA_KEY not in metadata:
        raise ArtifactError(f"{path}: an ONNX file, but not made by `ddsm export` (no {METADATA_KEY} in its metadata)")
    return ModelSpec.from_json(metadata[METADATA_KEY], source=str(path)), external


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata properties of an ONNX file, after a check of the whole file's outline.

    Raises:
        ArtifactError: missing, empty, cut short, not ONNX at all, or its weights lie in a file that is missing, too
            short, or outside the model's folder.
    """
    with walking(path) as walk:
        return walk.entries


def external_files(path: str | Path) -> tuple[str, ...]:
    """Names of the files beside an ONNX file that hold some of its weights, sorted; most models have none.

    Raises:
        ArtifactError: as `read_metadata`.
    """
    with walking(path) as walk:
        return tuple(sorted(walk.external))


@contextlib.contextmanager
def walking(path: str | Path) -> Iterator[Walk]:
    """The finished walk over a file whose bytes stay open.

    Raises:
        ArtifactError: as `read_metadata`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise ArtifactError(f"{path}: the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                yield Walk(path, data)
    except (OSError, ValueError) as exc:  # ValueError: a path with a null byte
        raise ArtifactError(f"{path}: can't be read ({getattr(exc, 'strerror', None) or exc})") from exc


class _DamagedError(Exception):
    """The bytes are no message of the expected kind; the text says what is wrong."""


class Walk:
    """One walk over one file's bytes, with a budget of fields.

    Attributes:
        entries: the model's metadata.
        external: files beside it that hold tensors of it, each with how many of its bytes are needed.
        outside: how many tensors those are.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.budget = MAX_FIELDS
        self.met: set[int] = set()  # fields of the model met so far
        self.external: dict[str, int] = {}
        self.outside = 0
        self.entries = self._metadata()
        for location, needed in self.external.items():
            _check_external(path, location, needed)
        self.budget = MAX_FIELDS  # for who goes on from here

    def _metadata(self) -> dict[str, str]:
        try:
            found = self.walk("model", 0, len(self.data), depth=0)
            if not {_GRAPH, _OPSET_IMPORT} <= self.met:
                raise _DamagedError("no graph, or no opset")
        except _DamagedError as exc:
            # writers put the version first, so a file that breaks before it never was ONNX
            if _IR_VERSION not in self.met:
                raise ArtifactError(f"{self.path}: not an ONNX file") from exc
            raise ArtifactError(f"{self.path}: damaged or cut short ({exc})") from exc
        return found

    def walk(self, message: str, start: int, end: int, *, depth: int) -> dict[str, str]:
        """Walks one message and all below it; returns its own entries."""
        if depth > MAX_DEPTH:
            raise _DamagedError(f"nested deeper than {MAX_DEPTH} levels")
        entries = {}
        for field, wire, first, last in self.fields(start, end):
            if depth == 0:
                self.met.add(field)
            child = _BRANCHES[message].get(field)
            if child is None:
                continue
            if wire != _BYTES:
                raise _DamagedError(f"field {field} at byte {first} is of the wrong kind")
            if child == "entry":
                key, value = self.entry(first, last)
                entries[key] = value
                continue
            below = self.walk(child, first, last, depth=depth + 1)
            if child == "tensor" and below:
                location = below.get("location", "")
                self.external[location] = max(self.external.get(location, 0), sum(extent(self.path, below)))
                self.outside += 1
        return entries

    def entry(self, start: int, end: int) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for field, wire, first, last in self.fields(start, end):
            if field in texts and wire == _BYTES:
                try:
                    texts[field] = self.data[first:last].decode("utf-8")
                except UnicodeDecodeError as exc:
                    raise _DamagedError(f"the text at byte {first} is not UTF-8") from exc
        return texts[1], texts[2]

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yields (field number, wire type, first byte, byte past the last) of a message's fields."""
        at = start
        while at < end:
            self.budget -= 1
            if self.budget < 0:
                raise _DamagedError(f"more than {MAX_FIELDS} fields")
            tag = self.data[at]
            tag, at = (
                (tag, at + 1) if tag < 0x80 else self.varint(at, end)
            )  # one byte, mostly: then in a third less time
            field, wire = tag >> 3, tag & 7
            first = at
            match wire:
                case 2:
                    length, first = self.varint(at, end)
                    at = first + length
                case 0:
                    _, at = self.varint(at, end)
                case 1:
                    at += 8
                case 5:
                    at += 4
                case _:
                    raise _DamagedError(f"unknown wire type {wire} at byte {first}")
            if not field:
                raise _DamagedError(f"field number 0 at byte {first}")
            if at > end:
                raise _DamagedError(f"{at - end} bytes are missing after byte {end}")
            yield field, wire, first, at

    def varint(self, at: int, end: int) -> tuple[int, int]:
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                raise _DamagedError(f"the number at byte {at} is cut off")
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
        raise _DamagedError(f"the number before byte {at} is too long")


def extent(model: Path, entries: Mapping[str, str]) -> tuple[int, int]:
    """Where a tensor's external data starts in its file, and how long it is; 0 where it does not say.

    Args:
        model: the ONNX file.
        entries: the tensor's ``location``, ``offset`` and ``length``.

    Raises:
        ArtifactError: they are no such numbers.
    """
    try:
        start, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError as exc:
        location = entries.get("location", "")
        raise ArtifactError(f"{model}: damaged (offset or length of {location!r} is not a number)") from exc
    if start < 0 or length < 0:
        raise ArtifactError(f"{model}: damaged (offset {start} and length {length} of a tensor's data)")
    return start, length


def _check_external(model: Path, location: str, needed: int) -> None:
    """Refuses external data unless it is a file in the model's folder (or below) of at least `needed` bytes.

    Raises:
        ArtifactError: the location is absolute, climbs out (also through a symbolic link), or the data isn't there.
    """
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    folder = model.parent.resolve()
    if not location or absolute or ".." in parts or "\0" in location:
        raise ArtifactError(f"{model}: refers to {location!r} outside its folder; refused")
    try:
        target = (folder / location).resolve()
    except (OSError, RuntimeError) as exc:  # RuntimeError: links that go in a circle, before Python 3.13
        raise ArtifactError(f"{model}: refers to {location!r}, which can't be followed ({exc})") from exc
    if not target.is_relative_to(folder):
        raise ArtifactError(f"{model}: refers to {location!r}, a link that leaves its folder; refused")
    if not target.is_file():
        raise ArtifactError(
            f"{model}: its weights lie in {location!r}, which is missing beside it; copy that too, or make one file of "
            f"both where they are: ddsm bundle WHOLE.onnx {model.name}"
        )
    if needed > (size := target.stat().st_size):
        raise ArtifactError(f"{model}: its weights file {location!r} is cut short ({size} bytes, {needed} needed)")
