"""JSON lines: one record a frame, with each class's share of the pixels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.streams.frames import Frame


class LinesSink:
    """Appends to a file: ``{"index": 0, "stamp": 17, "name": "17", "frame_id": "cam", "share": {"road": 0.4, …}}``.

    ``stamp`` is nanoseconds; ``share`` sums to 1 and leaves out classes that do not occur.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self.targets = (path,)
        self._file: BinaryIO | None = None

    def encode(self, frame: Frame, result: Segmentation) -> bytes:
        """See `Sink.encode`."""
        counts = np.bincount(result.mask.ravel(), minlength=len(result.classes))
        share = {
            name: round(int(n) / result.mask.size, 6) for name, n in zip(result.classes, counts, strict=False) if n
        }
        record = {
            "index": frame.index,
            "stamp": frame.stamp,
            "name": frame.name,
            "frame_id": frame.frame_id,
            "height": result.mask.shape[0],
            "width": result.mask.shape[1],
            "share": share,
        }
        return (json.dumps(record) + "\n").encode()

    def write(self, frame: Frame, encoded: bytes) -> None:
        """See `Sink.write`."""
        self._open().write(encoded)

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        file = self._open()
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""
        self.close()
        if self._path.exists():
            os.truncate(self._path, int(state.get("bytes", 0)))

    def finish(self) -> None:
        """See `Sink.finish`."""
        self.close()

    def close(self) -> None:
        """See `Sink.close`."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab")
        return self._file
