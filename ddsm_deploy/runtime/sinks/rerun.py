"""Recordings for the Rerun viewer: image, mask and class names on the frames' own times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.errors import BackendMissing
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sinks.base import Parts
from ddsm_deploy.streams.frames import Frame

JPEG_QUALITY = 85


class RerunSink:
    """Writes a folder of ``.rrd`` files, a part each, which the viewer joins: ``rerun OUT/rerun/*.rrd``.

    Args:
        folder: for the files.
        name: what the viewer calls the recording; parts of one name are one recording.

    Raises:
        BackendMissing: ``rerun-sdk`` is not installed.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, folder: Path, *, name: str) -> None:
        try:
            import rerun
        except ImportError as exc:
            raise BackendMissing("rerun", extra="rerun", why=str(exc)) from exc
        self._rerun = rerun
        self._name = name
        self._parts = Parts(folder, ".rrd")
        self._part: Path | None = None
        self._recording: Any = None

    def encode(self, frame: Frame, result: Segmentation) -> tuple[Image, Segmentation]:
        """See `Sink.encode`."""
        assert frame.image is not None
        return frame.image, result

    def write(self, frame: Frame, encoded: tuple[Image, Segmentation]) -> None:
        """See `Sink.write`."""
        image, result = encoded
        if self._recording is None:
            self._begin(result)
        recording, rerun = self._recording, self._rerun
        recording.set_time("frame", sequence=frame.index)
        recording.set_time("stamp", timestamp=np.datetime64(frame.stamp, "ns"))
        recording.log("camera", rerun.Image(image, color_model="BGR").compress(jpeg_quality=JPEG_QUALITY))
        recording.log("camera/mask", rerun.SegmentationImage(result.mask))

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        if self._recording is not None and self._part is not None:
            self.close()
            self._parts.add(self._part)
            self._part = None
        return {"parts": list(self._parts.names)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""
        self._parts.restore(state.get("parts", []))

    def finish(self) -> None:
        """See `Sink.finish`."""

    def close(self) -> None:
        """See `Sink.close`."""
        if self._recording is not None:
            self._recording.flush()
            self._recording.disconnect()
            self._recording = None

    def _begin(self, result: Segmentation) -> None:
        self._part = self._parts.begin()
        self._recording = self._rerun.RecordingStream("ddsm", recording_id=self._name)
        self._recording.save(self._part)
        classes = zip(result.classes, result.palette, strict=True)
        context = self._rerun.AnnotationContext([(i, name, colour) for i, (name, colour) in enumerate(classes)])
        self._recording.log("camera", context, static=True)
