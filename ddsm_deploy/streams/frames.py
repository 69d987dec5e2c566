"""What every source gives: frames in order, each with a stamp; and what every source is."""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from ddsm_deploy.images import Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a source.

    Attributes:
        index: its place in the source, from 0; a frame that can't be decoded has one too.
        stamp: when it was taken, nanoseconds: since the epoch where the source knows (a recording's header, a camera's
            arrival), else since the source's start (a video's presentation time).
        received: when a recording took it down, nanoseconds since the epoch; 0 where there is no such time.
        name: what it is called: a file's name, or its stamp.
        frame_id: the coordinate frame that a recording's header names, or empty.
        image: uint8 H×W×3, BGR; None where the frame is damaged.
        error: why there is no image, in one line; empty where there is one.
    """

    index: int
    stamp: int
    received: int = 0
    name: str
    frame_id: str = ""
    image: Image | None = None
    error: str = ""


@runtime_checkable
class Source(Protocol):
    """A sequence of frames.

    Attributes:
        name: what it is, in words, for messages.
        live: frames come by themselves, and one that is not taken in time is out of date. Others wait.
        rate: frames a second, where it is known.
        count: how many frames, where it is known; None for live ones.
    """

    name: str
    live: bool
    rate: float | None
    count: int | None

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from index `start` on, in order.

        A damaged frame comes with its error and without an image, and does not end the sequence. A live source has no
        past: it takes no other `start` than 0.

        Raises:
            InputError: the source can't be read any further.
        """
        ...

    def close(self) -> None:
        """Gives files and devices back; a `frames` in another thread ends with the frame that it is at. Again does
        nothing."""
        ...


class BaseSource(abc.ABC):
    """What sources share: `close` from any thread, and nothing is given back while another thread reads from it.

    A source adds `_frames` and `_release`, and looks at `_closed` between frames.
    """

    name = ""
    live = False
    rate: float | None = None
    count: int | None = None
    path: Path | None = None
    """The file or folder that is read, where there is one: it tells one source from another of the same name."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._closed = self._reading = False

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """See `Source.frames`."""
        with self._guard:
            if self._closed:
                return
            self._reading = True
        try:
            for frame in self._frames(start):
                yield frame
                if self._closed:
                    return
        finally:
            with self._guard:
                self._reading = False
                closed = self._closed
            if closed:
                self._release()

    def close(self) -> None:
        """See `Source.close`."""
        with self._guard:
            now = not self._closed and not self._reading
            self._closed = True
        if now:
            self._release()

    @abc.abstractmethod
    def _frames(self, start: int) -> Iterator[Frame]:
        """The frames from index `start` on; see `Source.frames`."""

    def _release(self) -> None:  # noqa: B027 - most have something to give back, not all
        """Gives everything back; called once."""
