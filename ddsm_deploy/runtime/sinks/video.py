"""A video of the overlays (H.264 in MP4)."""

from __future__ import annotations

import fractions
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.errors import BackendError, BackendMissing, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sinks.base import Parts
from ddsm_deploy.streams.frames import Frame

TICKS = 90_000
"""Of a second: the clock of presentation times."""

_OPTIONS = {"crf": "20", "preset": "veryfast", "bf": "0"}  # without B-frames packets come in the order of frames


class VideoSink:
    """Writes the image with the coloured mask over it, each frame at its own presentation time.

    Frames keep their distances in time, so a source of changing rate stays in step; where stamps do not grow, a frame
    comes 1/`rate` after the one before. All frames take the first one's size; odd sides lose a row or a column, which
    the codec's halved colours can't hold.

    Args:
        path: the MP4 file.
        parts: folder for its parts.
        rate: frames a second; None is 30.

    Raises:
        BackendMissing: PyAV is not installed.
        BackendError: it has no H.264 encoder.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, path: Path, parts: Path, *, rate: float | None = None) -> None:
        try:
            import av
        except ImportError as exc:
            raise BackendMissing("av", extra="av", why=str(exc)) from exc
        if "libx264" not in av.codecs_available:
            raise BackendError("this PyAV has no H.264 encoder (libx264); install a wheel of av from PyPI")
        self._av = av
        self._path = path
        self.targets = (path,)
        self._rate = fractions.Fraction(rate or 30.0).limit_denominator(1001)
        self._parts = Parts(parts, ".mp4")
        self._starts: list[int] = []  # first presentation time of each part, ticks from the first frame on
        self._first: int | None = None  # stamp of the first frame
        self._last = -1  # presentation time of the last frame, ticks
        self._size: tuple[int, int] | None = None
        self._part: Path | None = None
        self._output: Any = None
        self._stream: Any = None

    def encode(self, frame: Frame, result: Segmentation) -> Image:
        """See `Sink.encode`."""
        assert frame.image is not None
        return result.overlay(frame.image)

    def write(self, frame: Frame, encoded: Image) -> None:
        """See `Sink.write`."""
        height, width = encoded.shape[0] // 2 * 2, encoded.shape[1] // 2 * 2
        if not height or not width:
            size = "x".join(map(str, encoded.shape[1::-1]))
            raise InputError(f"frame {frame.index} is of {size} pixels; a video takes 2x2 at least")
        self._size = self._size or (height, width)
        self._first = frame.stamp if self._first is None else self._first
        time = round((frame.stamp - self._first) * TICKS / 1_000_000_000)
        if time <= self._last:
            time = self._last + round(TICKS / self._rate) if self._last >= 0 else 0
        if self._output is None:
            self._begin(time)
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(encoded[:height, :width]), format="bgr24")
        if (height, width) != self._size:
            picture = picture.reformat(width=self._size[1], height=self._size[0])
        picture.pts, picture.time_base = time - self._starts[-1], fractions.Fraction(1, TICKS)
        self._output.mux(self._stream.encode(picture))
        self._last = time

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        if self._output is not None and self._part is not None:
            self._output.mux(self._stream.encode(None))
            self._output.close()
            self._parts.add(self._part)
            self._output = self._part = None
        return {
            "parts": list(self._parts.names),
            "starts": list(self._starts),
            "first": self._first,
            "last": self._last,
            "size": self._size,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""
        self._parts.restore(state.get("parts", []))
        self._starts = list(state.get("starts", []))
        self._first, self._last = state.get("first"), state.get("last", -1)
        size = state.get("size")
        self._size = (size[0], size[1]) if size else None

    def finish(self) -> None:
        """See `Sink.finish`."""
        if not self._parts.names:  # joined by an earlier run, or nothing came
            return
        joined = self._parts.folder / "joined.mp4"
        with self._av.open(str(joined), "w") as output:
            stream = None
            for path, start in zip(self._parts.paths, self._starts, strict=True):
                with self._av.open(str(path)) as part:
                    if stream is None:
                        stream = output.add_stream_from_template(part.streams.video[0])
                    for packet in part.demux(video=0):
                        if packet.pts is None or packet.size == 0:  # the empty one that ends a file
                            continue
                        shift = round(start / (TICKS * packet.time_base))
                        packet.pts += shift
                        packet.dts = packet.pts
                        packet.stream = stream
                        output.mux(packet)
        joined.replace(self._path)
        self._parts.clear()

    def close(self) -> None:
        """See `Sink.close`."""
        output, self._output = self._output, None
        if output is not None:
            output.close()

    def _begin(self, start: int) -> None:
        assert self._size is not None
        self._part = self._parts.begin()
        del self._starts[len(self._parts.names) :]
        self._starts.append(start)
        self._output = self._av.open(str(self._part), "w", options={"video_track_timescale": str(TICKS)})
        self._stream = self._output.add_stream("libx264", rate=self._rate, options=_OPTIONS)
        self._stream.height, self._stream.width = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = fractions.Fraction(1, TICKS)
        self._stream.thread_count = 1  # inference has the cores
