"""Lines about what goes wrong again and again, told now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

PAUSE_SECONDS = 5.0
"""Lines of one kind are at least so far apart."""


class RareReport:
    """Passes a line on, unless one of its kind was passed on shortly before; the next one says how many were not.

    Args:
        report: gets the lines.
        pause: seconds between two of a kind.
    """

    def __init__(self, report: Callable[[str], None], *, pause: float = PAUSE_SECONDS) -> None:
        self._report = report
        self._pause = pause
        self._lock = threading.Lock()
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, kind: str, text: str) -> None:
        """Reports `text`; there are few kinds, and they are kept for good."""
        now = time.monotonic()
        with self._lock:
            last, untold = self._last.get(kind, (-self._pause, 0))
            if now - last < self._pause:
                self._last[kind] = (last, untold + 1)
                return
            self._last[kind] = (now, 0)
        self._report(f"{text} ({untold} more of this kind before)" if untold else text)
