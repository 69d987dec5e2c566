"""The journal of a stream's output folder: how far a run has come, so that one that was killed can go on.

One JSON file, replaced whole at each commit. While a run has it open, no other run gets the folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.listing import JOURNAL_NAME
from ddsm_deploy.runtime.manifest import Identity, lock

FORMAT = 1


@dataclasses.dataclass(kw_only=True)
class Progress:
    """How far a stream is segmented, with all that is safe on disk.

    Attributes:
        next: index of the first frame that is not.
        done: frames segmented.
        damaged: frames that came without an image.
        dropped: frames left out for newer ones.
        ended: the source was read to its end.
        finished: the final files are made.
        sinks: name -> what the sink's commit gave.
    """

    next: int = 0
    done: int = 0
    damaged: int = 0
    dropped: int = 0
    ended: bool = False
    finished: bool = False
    sinks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


class Journal:
    """The journal, held by this run; a context manager. `progress` is what an earlier run left, or a fresh one.

    Args:
        folder: the output folder, which exists.
        identity: model, settings, source and outputs of this run.
        overwrite: whether what is there is void.

    Raises:
        ConfigError: made by another model, from another source or with other settings, or another run has it open.
        InputError: it can't be read or written.
    """

    def __init__(self, folder: Path, *, identity: Identity, overwrite: bool = False) -> None:
        self.path = folder / JOURNAL_NAME
        self._identity = identity
        self._lock = -1
        try:
            self._lock = os.open(folder / f".{JOURNAL_NAME}.lock", os.O_RDWR | os.O_CREAT, 0o666)
            lock(self._lock, self.path)
            self.progress = self._read(overwrite)
        except OSError as exc:
            self.close()
            raise InputError(f"{folder}: can't be used as the output folder ({exc.strerror or exc})") from exc
        except BaseException:
            self.close()
            raise

    def write(self) -> None:
        """Makes `progress` what a later run goes on from.

        Raises:
            OSError: it can't be written; the one before it stays.
        """
        fields = {"ddsm_stream": FORMAT, **dataclasses.asdict(self._identity), **dataclasses.asdict(self.progress)}
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def close(self) -> None:
        """Lets others have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _read(self, overwrite: bool) -> Progress:
        if overwrite or not self.path.exists():
            return Progress()
        try:
            fields = json.loads(self.path.read_text(encoding="utf-8"))
            newer = fields.pop("ddsm_stream") > FORMAT
            there = Identity(**{key: fields.pop(key) for key in ("model", "sha256", "settings")})
            progress = Progress(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise InputError(f"{self.path}: can't be read ({exc}); --overwrite makes everything anew") from exc
        if newer:
            raise ConfigError(f"{self.path}: written by a newer version; update ddsm-deploy")
        if differences := self._identity.differences(there):
            if not progress.next and not progress.ended:  # it was stopped before anything of it was safe
                return Progress()
            raise ConfigError(
                f"{self.path.parent} was made otherwise: {'; '.join(differences)}; "
                "take another output folder, or --overwrite to make it anew"
            )
        return progress
