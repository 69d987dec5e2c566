"""What a node counts and times, in bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time

import numpy as np

WINDOW_SECONDS = 10.0
"""Rate and latency are those of the frames finished within so many seconds, of the last `_KEPT` at most."""

_KEPT = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Frames since the node's start.

    Attributes:
        received: messages that came.
        processed: frames whose mask was published.
        dropped: frames that gave way to newer ones, or that were not published in time.
        damaged: messages that are no image.
        failed: frames on which the runtime failed.
    """

    received: int = 0
    processed: int = 0
    dropped: int = 0
    damaged: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """The last seconds.

    Attributes:
        rate: frames a second.
        p50: median time from a message's arrival to its mask's publication, milliseconds; None without a frame.
        p99: 99th percentile likewise.
    """

    rate: float
    p50: float | None
    p99: float | None


class Statistics:
    """Counters and a window of latencies that any thread may feed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys((field.name for field in dataclasses.fields(Counts)), 0)
        self._done: collections.deque[tuple[float, float]] = collections.deque(maxlen=_KEPT)
        self._start = time.monotonic()

    def count(self, what: str) -> None:
        """One more of a field of `Counts`."""
        with self._lock:
            self._counts[what] += 1

    def processed(self, received: float) -> None:
        """One more frame is published; it came at `received` (`time.monotonic`)."""
        now = time.monotonic()
        with self._lock:
            self._counts["processed"] += 1
            self._done.append((now, now - received))

    @property
    def counts(self) -> Counts:
        """The counters now."""
        with self._lock:
            return Counts(**self._counts)

    @property
    def window(self) -> Window:
        """The last `WINDOW_SECONDS`."""
        now = time.monotonic()
        with self._lock:
            done = [(at, latency) for at, latency in self._done if now - at <= WINDOW_SECONDS]
        if not done:
            return Window(rate=0.0, p50=None, p99=None)
        # where more frames were finished than are kept, those kept span less time
        span = now - done[0][0] if len(done) == _KEPT else min(WINDOW_SECONDS, now - self._start)
        p50, p99 = (float(value) for value in np.percentile([1e3 * latency for _, latency in done], (50, 99)))
        return Window(rate=len(done) / span, p50=p50, p99=p99)
