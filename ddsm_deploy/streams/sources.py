"""Which source a word on the command line stands for."""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import MAX_PIXELS, SUFFIXES, read_image
from ddsm_deploy.listing import output_test, walk
from ddsm_deploy.streams import bag, video
from ddsm_deploy.streams.frames import BaseSource, Frame, Source

DEFAULT_RATE = 30.0
"""Frames a second that images of a folder stand for."""


class FolderSource(BaseSource):
    """Images of a folder, a glob or a file, in the order of their paths, as if taken at `rate`.

    A folder is searched recursively; hidden entries, links to folders and what earlier runs wrote are passed over.

    Raises:
        InputError: no image there.
    """

    def __init__(self, text: str, *, rate: float = DEFAULT_RATE, max_pixels: int = MAX_PIXELS) -> None:
        super().__init__()
        path = Path(text)
        if path.is_dir():
            found = list(walk(text, output_test(text)))
        elif path.exists():
            found = [text]
        else:
            found = [p for p in glob.glob(text, recursive=True) if Path(p).is_file()]  # noqa: PTH207
        if not found:
            raise InputError(f"{text}: no image there; looked for {' '.join(sorted(SUFFIXES))}")
        self.paths = sorted(found)
        self._max_pixels = max_pixels
        self.name = text
        self.rate = self._rate = rate
        self.count = len(found)

    def content(self) -> str:
        """Tells these images from others, by their paths, sizes and times of change."""
        digest = hashlib.sha256()
        for path in self.paths:
            with contextlib.suppress(OSError):  # gone meanwhile: told when its turn comes
                status = Path(path).stat()
                digest.update(f"{Path(path).absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return f"{self.count} images {digest.hexdigest()[:16]}"

    def _frames(self, start: int) -> Iterator[Frame]:
        for index in range(start, len(self.paths)):
            path = self.paths[index]
            stamp = round(index * 1e9 / self._rate)
            try:
                image = read_image(path, max_pixels=self._max_pixels)
            except InputError as exc:
                yield Frame(index=index, stamp=stamp, name=Path(path).stem, error=str(exc))
            else:
                yield Frame(index=index, stamp=stamp, name=Path(path).stem, image=image)


def open_source(
    text: str,
    *,
    topic: str | None = None,
    report: Callable[[str], None] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Opens what a word stands for.

    Args:
        text: a number (camera), a URL (``rtsp://``, ``http://``, ``udp://`` …) of a live stream or of a video file, a
            GStreamer pipeline (with ``!``), a recording (``.bag``, ``.mcap``, ``.db3``, or a folder with a
            ``metadata.yaml``), a video file, or else images: a folder, a glob, a file.
        topic: of a recording.
        report: called with a line when a network stream is lost or back.
        max_pixels: refuse larger frames.

    Raises:
        InputError: there is no such thing, or it can't be read.
        ConfigError: a recording's topic has to be named.
        BackendMissing: the package that reads it is not installed.
    """
    path = Path(text)
    if not path.exists():
        if text.isdecimal():
            return video.CameraSource(int(text), max_pixels=max_pixels)
        if "://" in text:
            return video.at_address(text, report=report, max_pixels=max_pixels)
        if _is_pipeline(text):
            return video.CameraSource(text, max_pixels=max_pixels)
    if bag.is_bag(path):
        return bag.BagSource(path, topic=topic, max_pixels=max_pixels)
    if topic is not None:
        raise ConfigError(f"{text}: a topic is for recordings, and this is none")
    if path.suffix.lower() in video.SUFFIXES:
        if not path.is_file():
            raise InputError(f"{text}: no such file")
        return video.VideoSource(path, max_pixels=max_pixels)
    return FolderSource(text, max_pixels=max_pixels)


def is_stream(text: str) -> bool:
    """Whether a word stands for anything but images in files; see `open_source`."""
    path = Path(text)
    named = not path.exists() and (text.isdecimal() or "://" in text or _is_pipeline(text))
    return named or bag.is_bag(path) or path.suffix.lower() in video.SUFFIXES


def _is_pipeline(text: str) -> bool:
    """Whether it has GStreamer's ``!`` between elements; that of a glob's ``[!…]`` is none."""
    return "!" in text.replace("[!", "")
