"""Lines about what goes wrong again and again, told now and then."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

PAUSE_SECONDS = 5.0
"""Lines of one kind are at least so far apart."""


class RareReport:
    """Passes a line on, unless one of its kind was passed on shortly before; the next one says how many were not.

    Args:
        report: gets the lines.
        clock: gives seconds.
    """

    def __init__(self, report: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, kind: str, text: str) -> None:
        """Reports `text`; there are few kinds, and they are kept for good."""
        now = self._clock()
        with self._lock:
            last, untold = self._last.get(kind, (-math.inf, 0))
            if now - last < PAUSE_SECONDS:
                self._last[kind] = (last, untold + 1)
                return
            self._last[kind] = (now, 0)
        self._report(f"{text} ({untold} more of this kind before)" if untold else text)
