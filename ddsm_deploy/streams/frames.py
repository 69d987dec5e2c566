"""What every source gives: frames in order, each with a stamp; and what every source is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

from ddsm_deploy.images import Image


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """One frame of a source.

    Attributes:
        index: its place in the source, from 0; a frame that can't be decoded has one too.
        stamp: when it was taken, nanoseconds: since the epoch where the source knows (a recording's header, a camera's
            arrival), else since the source's start (a video's presentation time).
        name: what it is called: a file's name, or its stamp.
        frame_id: the coordinate frame that a recording's header names, or empty.
        image: uint8 H×W×3, BGR; None where the frame is damaged.
        error: why there is no image, in one line; empty where there is one.
    """

    index: int
    stamp: int
    name: str
    frame_id: str = ""
    image: Image | None = None
    error: str = ""


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
        """Gives files and devices back; ends a `frames` that waits in another thread. Again does nothing."""
        ...
