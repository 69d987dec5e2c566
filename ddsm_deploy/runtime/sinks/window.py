"""A window that shows the overlay, where there is a display."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import cv2

from ddsm_deploy.errors import BackendError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.streams.frames import Frame


class WindowSink:
    """Shows each result as it comes. Closing the window hides it; the stream goes on.

    By Tk, since the OpenCV that this package installs has no windows.

    Raises:
        BackendError: there is no display, or Python was built without Tk.
    """

    outputs: tuple[str, ...] = ()

    def __init__(self, title: str) -> None:
        try:
            import tkinter
        except ImportError as exc:
            raise BackendError(f"a window needs tkinter ({exc}); install the distribution's python3-tk") from exc
        try:
            self._window: tkinter.Tk | None = tkinter.Tk()
        except tkinter.TclError as exc:
            raise BackendError(f"no window can be shown ({exc}); leave --show out where there is no display") from exc
        self._gone = tkinter.TclError
        self._window.title(title)
        self._window.protocol("WM_DELETE_WINDOW", self.close)
        self._picture = tkinter.PhotoImage(master=self._window)
        tkinter.Label(self._window, image=self._picture, borderwidth=0).pack()

    def encode(self, frame: Frame, result: Segmentation) -> Image:
        """See `Sink.encode`."""
        assert frame.image is not None
        return result.overlay(frame.image)

    def write(self, frame: Frame, encoded: Image) -> None:
        """See `Sink.write`."""
        if self._window is None:
            return
        height, width = encoded.shape[:2]
        header = f"P6 {width} {height} 255 ".encode()
        self._picture.configure(data=header + cv2.cvtColor(encoded, cv2.COLOR_BGR2RGB).tobytes(), format="ppm")
        self._window.update()

    def commit(self) -> dict[str, Any]:
        """See `Sink.commit`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `Sink.restore`."""

    def finish(self) -> None:
        """See `Sink.finish`."""

    def close(self) -> None:
        """See `Sink.close`."""
        if self._window is not None:
            window, self._window = self._window, None
            with contextlib.suppress(self._gone):
                window.destroy()
