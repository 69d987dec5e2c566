"""The manifest of an output folder: what was made from what, so that a run can be resumed and audited.

A JSON-lines file that only grows. A *header* says which model and settings made what follows; then one record an input:

    {"ddsm_manifest": 1, "model": "ddsm-lite0", "sha256": "…", "settings": {"fit": "stretch", "precision": "fp32"}}
    {"source": "/data/a.png", "name": "a", "bytes": 9, "mtime_ns": 1, "size": [360, 480], "outputs": ["masks/a.png"], …}
    {"source": "/data/b.png", "error": "/data/b.png: the file is empty"}

The last record of an input counts, and a header voids all records before it. A last line that a crash or a full disk
tore is dropped. While a run has the manifest open, no other run gets it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ddsm_deploy.errors import ConfigError, InputError

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """What makes two runs' outputs the same: the model's bytes, and the settings that change a mask.

    Attributes:
        model: its name, for people.
        sha256: of the model file that runs (see `onnxweights.model_sha256`).
        settings: names and values, for instance ``{"fit": "stretch", "precision": "fp32"}``.
    """

    model: str
    sha256: str
    settings: dict[str, str]

    def differences(self, other: Identity) -> list[str]:
        """What differs, in words: ``other`` is what is there, ``self`` is what is wanted."""
        found = []
        if self.sha256 != other.sha256:
            found.append(f"model {other.model} ({other.sha256[:12]}…) there, {self.model} ({self.sha256[:12]}…) wanted")
        for key in sorted(self.settings.keys() | other.settings.keys()):
            there, wanted = other.settings.get(key), self.settings.get(key)
            if there != wanted:
                found.append(f"{key} {there} there, {wanted} wanted")
        return found


class Finished(NamedTuple):
    """What a finished input was: its outputs' name, and the state of its file."""

    name: str
    bytes: int
    mtime_ns: int


class Manifest:
    """The manifest, open for appending; a context manager. `finished` maps inputs to what earlier runs made of them.

    Args:
        path: the file; made where missing.
        identity: of this run.
        overwrite: whether records that are there are void, whoever made them.
        place: what messages call the output folder; None is the one that `path` lies in.

    Raises:
        ConfigError: the folder was made by another model or with other settings, or another run has it open.
        InputError: the file can't be read or written.
    """

    def __init__(self, path: Path, *, identity: Identity, overwrite: bool = False, place: str | None = None) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as exc:
            raise InputError(f"{path}: can't be written ({exc.strerror or exc})") from exc
        try:
            lock(self._file, path)
            there, self.finished = _read(path)
            self._drop_torn_line()
            if there is not None and not overwrite and (differences := identity.differences(there)):
                made_at = there.settings.get("precision")
                go_on = "" if made_at == identity.settings.get("precision") else f"--precision {made_at} to go on, "
                raise ConfigError(
                    f"{place or path.parent} was made otherwise: {'; '.join(differences)}; "
                    f"take another output folder, {go_on}or --overwrite to make it anew"
                )
            if there is None or overwrite:
                self.finished.clear()
                self.add({"ddsm_manifest": FORMAT, **dataclasses.asdict(identity)})
        except OSError as exc:
            self.close()
            raise InputError(f"{path}: can't be used ({exc.strerror or exc})") from exc
        except BaseException:
            self.close()
            raise

    def add(self, record: dict[str, Any]) -> None:
        """Appends one input's record.

        Raises:
            OSError: it could not be written whole; nothing of it is left.
        """
        line = (json.dumps(record) + "\n").encode()  # ASCII: also holds names that are not valid Unicode
        before = os.fstat(self._file).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            with contextlib.suppress(OSError):  # the write's error is the one to tell
                os.ftruncate(self._file, before)
            raise
        _apply(record, self.finished)

    def close(self) -> None:
        """Releases the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)


def _read(path: Path) -> tuple[Identity | None, dict[str, Finished]]:
    identity: Identity | None = None
    finished: dict[str, Finished] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
                if "ddsm_manifest" in record:
                    identity = _identity(record, path)
                    finished.clear()
                else:
                    _apply(record, finished)
            except (ValueError, KeyError, TypeError):
                continue  # a torn or foreign line only costs its input another pass
    return identity, finished


def _apply(record: dict[str, Any], finished: dict[str, Finished]) -> None:
    if "error" in record:
        finished.pop(record["source"], None)
    elif "source" in record:
        finished[record["source"]] = Finished(record["name"], record["bytes"], record["mtime_ns"])


def _identity(record: dict[str, Any], path: Path) -> Identity:
    if record["ddsm_manifest"] > FORMAT:
        raise ConfigError(f"{path}: written by a newer version; update ddsm-deploy")
    return Identity(model=record["model"], sha256=record["sha256"], settings=dict(record["settings"]))


def lock(file: int, path: Path) -> None:
    """Takes an open file for this process, until it is closed; `path` lies in the output folder that it stands for.

    Raises:
        ConfigError: another run has it.
    """
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise ConfigError(f"{path.parent}: another run is writing there; wait for it, or take another folder") from exc
    except OSError:
        return  # a file system without locks, as some network ones are
