"""Video files, network streams and cameras as sources.

Files and network streams are read by PyAV, which gives every frame's own presentation time; cameras and GStreamer
pipelines by OpenCV.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ddsm_deploy.errors import BackendMissing, InputError
from ddsm_deploy.images import MAX_PIXELS, Image
from ddsm_deploy.streams.frames import BaseSource, Frame

SUFFIXES = frozenset(
    {".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".mjpeg", ".wmv"}
)
"""Files that are videos, compared in lower case."""

OPEN_SECONDS, READ_SECONDS = 10.0, 10.0
"""How long a network stream may take to open, and to send the next frame, before the connection counts as lost."""

_THREADS = "SLICE"
"""How PyAV decodes. Whole frames on threads of their own (``FRAME``, ``AUTO``) come late by one for each thread: a live
stream lags and is stamped late, and a damaged packet near the end takes them all along."""

FRESH_SECONDS = 0.5
"""A connection that was open for longer before its first frame is wanted has frames waiting, and is opened again."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a lost stream is tried again: doubled after each failure, up to the longest."""


class VideoSource(BaseSource):
    """A video file, here or at an address.

    Stamps are presentation times, nanoseconds from the first frame on. Rotation that the file asks for is applied. A
    frame that can't be decoded is reported where it is missed, and decoding goes on with the next packet.

    Raises:
        InputError: not a video, or without a picture track.
        BackendMissing: PyAV is not installed.
    """

    def __init__(self, path: str | Path, *, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__()
        self._av = _pyav()
        self._max_pixels = max_pixels
        self.name = str(path)
        remote = "://" in self.name
        self.path = None if remote else Path(path)
        timeout = (OPEN_SECONDS, READ_SECONDS) if remote else None
        try:
            self._container = self._av.open(self.name, metadata_errors="replace", timeout=timeout)
        except (self._av.FFmpegError, OSError, ValueError) as exc:
            raise InputError(f"{path}: can't be read as a video ({_line(exc)})") from exc
        if not self._container.streams.video:
            self._container.close()
            raise InputError(f"{path}: holds no pictures")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = _THREADS
        self.rate = float(self._stream.average_rate) if self._stream.average_rate else None
        self.count = self._stream.frames or None  # what the header says; not every format has it

    def _frames(self, start: int) -> Iterator[Frame]:
        # from the beginning: an index is a count of decoded frames, and seeking by time would not be exact
        first: int | None = None
        index = -1
        for index, picture in enumerate(self._decoded()):
            if isinstance(picture, str):
                if index >= start:
                    yield Frame(index=index, stamp=0, name=f"{index:08d}", error=picture)
                continue
            stamp = _nanoseconds(picture)
            first = stamp if first is None else first
            if index >= start:
                yield self._frame(index, stamp - first, picture)
        if self.path is None and self.count and index + 1 < self.count:  # FFmpeg calls a lost connection the end
            raise InputError(f"{self.name}: ends after {index + 1} of {self.count} frames; was the connection lost?")

    def _release(self) -> None:
        self._container.close()

    def _decoded(self) -> Iterator[Any]:
        """Pictures in presentation order; a text in place of one that can't be decoded."""
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except self._av.FFmpegError as exc:
                text = f"{self.name}: can't be read any further ({_line(exc)})"
                if self.path is None:  # the connection: a later run may go on
                    raise InputError(text) from exc
                yield text
                return
            try:
                pictures = packet.decode()
            except self._av.FFmpegError as exc:
                yield f"{self.name}: a frame can't be decoded ({_line(exc)})"
                continue
            for picture in pictures:
                yield f"{self.name}: a damaged frame" if picture.is_corrupt else picture

    def _frame(self, index: int, stamp: int, picture: Any) -> Frame:
        return _frame(index, stamp, f"{index:08d}", picture, self._max_pixels)


def at_address(
    url: str, *, report: Callable[[str], None] | None = None, max_pixels: int = MAX_PIXELS
) -> NetworkSource | VideoSource:
    """What is at an address: a live stream, or over HTTP a video file, which is read once and waits for its reader.

    Args: as of `NetworkSource`.

    Raises: as `NetworkSource`.
    """
    stream = NetworkSource(url, report=report, max_pixels=max_pixels)
    if not (url.startswith(("http://", "https://")) and stream.ends):
        return stream
    stream.close()
    return VideoSource(url, max_pixels=max_pixels)


class NetworkSource(BaseSource):
    """A live network stream (``rtsp://``, ``http://``, ``udp://`` …), opened anew whenever it is lost.

    Stamps are arrival times, nanoseconds since the epoch. Between losing the connection and having it again the waits
    double from `FIRST_WAIT` to `LONGEST_WAIT`.

    Args:
        url: the stream.
        report: called with a line whenever the connection is lost or back.
        attempts: failures in a row after which it gives up; None never does.
        max_pixels: refuse larger frames.

    Raises:
        InputError: it can't be opened at first: an address that never worked is not one to wait for.
        BackendMissing: PyAV is not installed.
    """

    live = True

    def __init__(
        self,
        url: str,
        *,
        report: Callable[[str], None] | None = None,
        attempts: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__()
        self._max_pixels = max_pixels
        self._av = _pyav()
        self.name = url
        self._report = report or (lambda _: None)
        self._attempts = attempts
        self.reconnections = 0
        try:
            self._container = self._open()
        except (self._av.FFmpegError, OSError, ValueError) as exc:
            raise InputError(f"{url}: can't be opened ({_line(exc)})") from exc
        self._opened = time.monotonic()
        stream = self._container.streams.video[0]
        self.rate = float(stream.average_rate) if stream.average_rate else None

    @property
    def ends(self) -> bool:
        """Whether it has a length: of a live stream neither seconds nor bytes are known, but its playlist has bytes."""
        container = self._container
        return container.duration is not None or ("hls" not in container.format.name and container.size > 0)

    def _open(self) -> Any:
        options = {"rtsp_transport": "tcp"} if self.name.startswith("rtsp") else {}
        container = self._av.open(self.name, timeout=(OPEN_SECONDS, READ_SECONDS), options=options)
        if not container.streams.video:
            container.close()
            raise ValueError("it holds no pictures")
        container.streams.video[0].thread_type = _THREADS
        return container

    def _frames(self, start: int) -> Iterator[Frame]:
        if start:
            raise InputError(f"{self.name}: a live stream has no past to start from")
        index, failures = 0, 0
        if time.monotonic() - self._opened > FRESH_SECONDS:  # a model was loaded meanwhile
            self._container.close()
            with contextlib.suppress(self._av.FFmpegError, OSError, ValueError):  # then it counts as lost, below
                self._container = self._open()
        while not self._closed:
            why = "it ended"
            try:
                for picture in self._decoded():
                    failures = 0
                    stamp = time.time_ns()
                    if isinstance(picture, str):
                        yield Frame(index=index, stamp=stamp, name=str(stamp), error=picture)
                    else:
                        yield _frame(index, stamp, str(stamp), picture, self._max_pixels)
                    index += 1
            except (self._av.FFmpegError, OSError, ValueError) as exc:
                why = _line(exc)
            if self._closed:
                return
            self._container.close()
            self._report(f"{self.name}: lost ({why})")
            failures = self._again(failures)

    def _decoded(self) -> Iterator[Any]:
        """Pictures as they come; a text in place of one that can't be decoded. Errors are those of the connection."""
        for packet in self._container.demux(video=0):
            try:
                pictures = packet.decode()
            except (self._av.FFmpegError, ValueError) as exc:
                yield f"{self.name}: a frame can't be decoded ({_line(exc)})"
                continue
            for picture in pictures:
                yield f"{self.name}: a damaged frame" if picture.is_corrupt else picture

    def _again(self, failures: int) -> int:
        """Waits and opens until it is open; returns the failures in a row so far."""
        while not self._closed:
            failures += 1
            if self._attempts is not None and failures > self._attempts:
                raise InputError(f"{self.name}: lost, and not back after {self._attempts} attempts")
            until = time.monotonic() + min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1))
            while not self._closed and time.monotonic() < until:
                time.sleep(0.05)
            try:
                self._container = self._open()
            except (self._av.FFmpegError, OSError, ValueError):
                continue
            self.reconnections += 1
            self._report(f"{self.name}: back")
            return failures
        return failures

    def _release(self) -> None:
        self._container.close()


class CameraSource(BaseSource):
    """A camera by its number, or a GStreamer pipeline, through OpenCV. Stamps are arrival times, since the epoch.

    Raises:
        InputError: it can't be opened.
    """

    live = True

    def __init__(self, which: int | str, *, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__()
        self._max_pixels = max_pixels
        self.name = f"camera {which}" if isinstance(which, int) else which
        if isinstance(which, str) and "GStreamer:                   YES" not in cv2.getBuildInformation():
            raise InputError(
                f"{which}: a GStreamer pipeline, and this OpenCV is built without GStreamer (wheels are); "
                "install the distribution's python3-opencv"
            )
        self._capture = (
            cv2.VideoCapture(which, cv2.CAP_GSTREAMER) if isinstance(which, str) else cv2.VideoCapture(which)
        )
        if not self._capture.isOpened():
            self._capture.release()
            raise InputError(f"{self.name}: can't be opened; is it there, and does this user have access to it?")
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or None

    def _frames(self, start: int) -> Iterator[Frame]:
        if start:
            raise InputError(f"{self.name}: a camera has no past to start from")
        index = 0
        while not self._closed:
            taken, image = self._capture.read()
            stamp = time.time_ns()
            if not taken:
                raise InputError(f"{self.name}: gives no frames any more")
            height, width = image.shape[:2]
            if error := _too_large(width, height, self._max_pixels):
                yield Frame(index=index, stamp=stamp, name=str(stamp), error=error)
            else:
                yield Frame(index=index, stamp=stamp, name=str(stamp), image=np.asarray(image, dtype=np.uint8))
            index += 1

    def _release(self) -> None:
        self._capture.release()


def upright(picture: Any) -> Image:
    """A decoded picture as uint8 H×W×3, BGR, turned as its file asks for."""
    image: Image = picture.to_ndarray(format="bgr24")
    turns = round(getattr(picture, "rotation", 0) / 90) % 4  # degrees, counter-clockwise
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _frame(index: int, stamp: int, name: str, picture: Any, max_pixels: int) -> Frame:
    if error := _too_large(picture.width, picture.height, max_pixels):
        return Frame(index=index, stamp=stamp, name=name, error=error)
    return Frame(index=index, stamp=stamp, name=name, image=upright(picture))


def _too_large(width: int, height: int, max_pixels: int) -> str:
    """What is wrong with a frame of this size; empty where nothing is."""
    if width * height <= max_pixels:
        return ""
    return f"a frame of {width}x{height} pixels; expected at most {max_pixels}"


def _nanoseconds(picture: Any) -> int:
    if picture.pts is None or picture.time_base is None:
        return 0
    return int(picture.pts * picture.time_base * 1_000_000_000)


def _pyav() -> Any:
    try:
        import av
    except ImportError as exc:
        raise BackendMissing("av", extra="av", why=str(exc)) from exc
    av.logging.set_level(av.logging.PANIC)  # what goes wrong comes as exceptions
    return av


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__
