"""The bundle on disk: its record ``bundle.json``, the check of every member, and reading it from a zip.

    {"format": 3, "name": "ddsm-lite0", "weights": "model.weights", "weights_sha256": "…", "artifacts": [
        {"file": "model.onnx", "kind": "onnx", "precision": "fp32", "sha256": "…"},
        {"file": "model.int8.onnx", "kind": "onnx", "precision": "int8", "target": "openvino", "sha256": "…"},
        {"file": "model.fp16.engine", "kind": "engine", "precision": "fp16", "target": "tensorrt", "sha256": "…",
         "record": "model.fp16.engine.json", "record_sha256": "…"}]}

Kind, precision and target together name a member. The weights are a file that the ONNX members share (see
`onnxweights`). Format 2 had none; format 1 had neither targets nor engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ddsm_deploy.cache import cache_folder
from ddsm_deploy.errors import ArtifactError, InputError
from ddsm_deploy.files import writing
from ddsm_deploy.spec import PRECISIONS, sha256_of

BUNDLE_FILE = "bundle.json"
BUNDLE_FORMAT = 3

KINDS = {"onnx": ".onnx", "checkpoint": ".safetensors", "engine": ".engine"}
"""Kinds of file a model comes in, each with its suffix."""

MAX_RECORD = 1_000_000
"""Bytes of a bundle.json in a zip."""

MAX_GROWTH = 100
"""What a zip unpacks to may be so many times its own size (weights hardly shrink), and `FREE_GROWTH` bytes more."""

FREE_GROWTH = 16_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a bundle, as its record states it.

    Attributes:
        file: its name, in the bundle's folder.
        kind: of `KINDS`.
        precision: of `spec.PRECISIONS`: what its graph is written in, or what an engine computes in.
        sha256: of its bytes, in hex.
        target: the backend that it was written for; empty for one that any can run.
        record: an engine's record, a file beside it; empty for other kinds.
        record_sha256: of the record's bytes.
    """

    file: str
    kind: str
    precision: str
    sha256: str
    target: str = ""
    record: str = ""
    record_sha256: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not isinstance(getattr(self, field.name), str):
                raise ArtifactError(f"the {field.name} of a member is {getattr(self, field.name)!r}, not a text")
        if self.kind not in KINDS:
            raise ArtifactError(f"{self.file} is of kind {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.precision not in PRECISIONS:
            raise ArtifactError(
                f"{self.file} has precision {self.precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        if (self.kind == "engine") != bool(self.record):
            raise ArtifactError(f"{self.file} is of kind {self.kind!r} and has {'a' if self.record else 'no'} record")
        for name in self.files:
            if not _is_plain(name):
                raise ArtifactError(f"it refers to {name!r} outside the bundle; refused")

    @property
    def files(self) -> dict[str, str]:
        """Names of the files that belong to it, each with its sha256."""
        both = {self.file: self.sha256, self.record: self.record_sha256}
        return {name: digest for name, digest in both.items() if name or name == self.file}

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it among the members."""
        return self.kind, self.precision, self.target

    def to_json(self) -> dict[str, str]:
        """Its entry in the record, without the empty fields."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle's record.

    Attributes:
        name: the model's.
        members: at least one; the first is what runs where nothing is asked for, unless one of fp32 is there.
        weights: the file in which ONNX members have weights; empty where there is none.
        weights_sha256: of its bytes.
    """

    name: str
    members: tuple[Member, ...]
    weights: str = ""
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        if not self.members:
            raise ArtifactError("it lists no artefact")
        if not (isinstance(self.weights, str) and isinstance(self.weights_sha256, str)):
            raise ArtifactError(f"its weights are {self.weights!r} of sha256 {self.weights_sha256!r}, not texts")
        if self.weights and not _is_plain(self.weights):
            raise ArtifactError(f"it refers to {self.weights!r} outside the bundle; refused")
        keys: set[tuple[str, str, str]] = set()
        files = {self.weights}
        for member in self.members:
            if member.key in keys:
                raise ArtifactError(f"it lists two of {describe(*member.key)}; expected one each")
            if files & member.files.keys():
                raise ArtifactError(f"it lists {member.file} twice")
            keys.add(member.key)
            files |= member.files.keys()

    @property
    def files(self) -> dict[str, str]:
        """Names of all files but the record, each with its sha256."""
        files = {name: digest for member in self.members for name, digest in member.files.items()}
        return files | ({self.weights: self.weights_sha256} if self.weights else {})

    def to_json(self) -> str:
        """The text of ``bundle.json``: equal records give equal bytes."""
        weights = {"weights": self.weights, "weights_sha256": self.weights_sha256}
        fields = {
            "format": BUNDLE_FORMAT,
            "name": self.name,
            **(weights if self.weights else {}),
            "artifacts": [member.to_json() for member in self.members],
        }
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def describe(kind: str, precision: str, target: str = "") -> str:
    """What names a member, in words: ``onnx int8 for openvino``."""
    return f"{kind} {precision}" + (f" for {target}" if target else "")


def read_bundle(folder: Path) -> Bundle:
    """Reads ``bundle.json`` of a folder and checks every file that it lists against its sha256.

    Raises:
        ArtifactError: there is none, it is not a record, or a file is missing, damaged or outside the folder.
    """
    record = folder / BUNDLE_FILE
    try:
        data = record.read_bytes()
    except FileNotFoundError as exc:
        raise ArtifactError(f"{folder}: not a model bundle (no {BUNDLE_FILE} in it)") from exc
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{record}: can't be read ({getattr(exc, 'strerror', None) or exc})") from exc
    bundle = parse_bundle(data, source=str(record))
    for name, digest in bundle.files.items():
        _check(folder / name, digest)
    return bundle


def parse_bundle(data: bytes, *, source: str) -> Bundle:
    """Reads the text of a ``bundle.json``; `source` names it in messages.

    Raises:
        ArtifactError: it is not one, or a newer one.
    """
    try:
        fields = json.loads(data.decode("utf-8"))
        form = fields["format"]
        if form not in range(1, BUNDLE_FORMAT + 1):
            raise ArtifactError(f"format {form}; this version reads up to {BUNDLE_FORMAT}; update ddsm-deploy")
        members = tuple(_member(entry) for entry in fields["artifacts"])
        weights = {name: fields[name] for name in ("weights", "weights_sha256") if name in fields}
        return Bundle(name=str(fields["name"]), members=members, **weights)
    except ArtifactError as exc:
        raise ArtifactError(f"{source}: {exc}") from exc
    except (RecursionError, ValueError, TypeError, KeyError, AttributeError) as exc:
        raise ArtifactError(f"{source}: not a bundle record ({type(exc).__name__}: {exc})") from exc


def bundle_at(path: Path) -> Bundle | None:
    """The record of the bundle in a folder, or in a ``.zip``; None where there is none that can be read. Its files are
    not looked at."""
    try:
        if path.is_dir():
            data = (path / BUNDLE_FILE).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                _, data = _record_of(archive, path)
        return parse_bundle(data, source=str(path))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, RuntimeError, ValueError, OSError):
        return None
    except ArtifactError:
        return None


def check_file_name(output: Path, suffix: str) -> None:
    """Refuses a name that no model's one file of a kind may take: one by which it would not be known again, or that of
    a bundle, or of a file that a bundle records.

    Args:
        output: the name.
        suffix: of the kind, as ``.onnx``.

    Raises:
        InputError: it is such a name.
    """
    if output.suffix.lower() == ".zip":
        raise InputError(f"{output}: is the name of a bundle; expected that of one file")
    with writing(output):
        folder = output.is_dir()  # told in its own words, where it is written
    if output.suffix.lower() != suffix and not folder:
        raise InputError(f"{output}: expected a name that ends in {suffix}")
    bundle = bundle_at(output.parent)
    if bundle is not None and output.name in (BUNDLE_FILE, *bundle.files):
        raise InputError(f"{output}: belongs to the bundle {bundle.name}; take another name, and `ddsm bundle` adds it")


def unpack(path: Path) -> Path:
    """The folder to which a zipped bundle is unpacked, in the user's cache; once for each content of the zip.

    An unpacked copy that no longer equals the zip is made anew. Several processes may do this at once.

    Raises:
        ArtifactError: it is no zip, no bundle, damaged, too large, or refers outside itself; or the cache folder can't
            be written.
    """
    try:
        place = cache_folder() / "bundles" / sha256_of(path)
        with zipfile.ZipFile(path) as archive:
            prefix, data = _record_of(archive, path)
            bundle = parse_bundle(data, source=f"{path}: {BUNDLE_FILE}")
            if not _is_whole(place, data):
                with _locked(place.parent):
                    if not _is_whole(place, data):  # another process may have done it meanwhile
                        _unpack(archive, prefix, data, bundle, place)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, RuntimeError, ValueError) as exc:
        raise ArtifactError(f"{path}: damaged, or not a zip file ({exc})") from exc
    except OSError as exc:
        raise ArtifactError(
            f"{path}: can't be read or unpacked ({exc.strerror or exc}: {exc.filename or path})"
        ) from exc
    return place


def _member(entry: Any) -> Member:
    known = {field.name for field in dataclasses.fields(Member)}
    return Member(**{name: value for name, value in entry.items() if name in known})


def _is_plain(name: str) -> bool:
    alone = name == PurePosixPath(name).name == PureWindowsPath(name).name
    return alone and name not in ("", ".", "..", BUNDLE_FILE) and "\0" not in name


def _check(path: Path, digest: str) -> None:
    try:
        actual = sha256_of(path)
    except OSError as exc:
        raise ArtifactError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    if actual != digest.lower():
        raise ArtifactError(f"{path}: damaged (sha256 {actual[:12]}…, the bundle says {digest[:12]}…); fetch it again")


def _record_of(archive: zipfile.ZipFile, path: Path) -> tuple[str, bytes]:
    """The folder inside the zip that holds the bundle (empty or ``NAME/``), and the bytes of its record."""
    found = [i for i in archive.infolist() if i.filename.split("/")[-1] == BUNDLE_FILE and i.filename.count("/") < 2]
    if len(found) != 1:
        raise ArtifactError(f"{path}: not a model bundle ({len(found)} files {BUNDLE_FILE} in the zip; expected one)")
    if found[0].file_size > MAX_RECORD:
        raise ArtifactError(f"{path}: its {BUNDLE_FILE} has {found[0].file_size} bytes; refused")
    return found[0].filename.removesuffix(BUNDLE_FILE), archive.read(found[0])


def _is_whole(place: Path, data: bytes) -> bool:
    try:
        return (place / BUNDLE_FILE).read_bytes() == data and bool(read_bundle(place))
    except (OSError, ArtifactError):
        return False


def _unpack(archive: zipfile.ZipFile, prefix: str, data: bytes, bundle: Bundle, place: Path) -> None:
    """Makes `place` whole: unpacked and checked beside it, then renamed, so that nobody sees a half of it."""
    path = archive.filename
    entries = {info.filename: info for info in archive.infolist()}
    wanted: dict[str, zipfile.ZipInfo] = {}
    for name in bundle.files:
        if prefix + name not in entries:
            raise ArtifactError(f"{path}: {name} is missing in the zip; fetch it again")
        wanted[name] = entries[prefix + name]
    packed = Path(str(path)).stat().st_size
    total = sum(info.file_size for info in wanted.values())
    if total > MAX_GROWTH * packed + FREE_GROWTH:
        raise ArtifactError(f"{path}: its {packed} bytes would unpack to {total}; refused")

    fresh = Path(tempfile.mkdtemp(prefix=f".{place.name[:12]}.", dir=place.parent))
    try:
        (fresh / BUNDLE_FILE).write_bytes(data)
        for name, info in wanted.items():
            with archive.open(info) as source, (fresh / name).open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        try:
            read_bundle(fresh)
        except ArtifactError as exc:
            raise ArtifactError(str(exc).replace(f"{fresh}{os.sep}", f"{path}: ")) from exc
        _put(fresh, place, data)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _put(fresh: Path, place: Path, data: bytes) -> None:
    """Renames `fresh` to `place`, after a damaged folder there is moved out of the way."""
    aside = fresh.with_name(fresh.name + "d")
    try:
        with contextlib.suppress(FileNotFoundError):
            place.rename(aside)
        fresh.rename(place)
    except OSError:
        if not _is_whole(place, data):  # where there are no locks, another process may have put its copy there
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, where the system has such."""
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks, as some network ones are
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
