"""The window shows the overlay: needs a display."""

from __future__ import annotations

import os
import sys

import numpy as np
import pytest

from ddsm_deploy.errors import BackendError
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sinks.window import WindowSink
from ddsm_deploy.streams.frames import Frame


@pytest.fixture(autouse=True)
def _tk(need) -> None:
    need("tkinter")


def test_without_a_display_it_says_so(monkeypatch: pytest.MonkeyPatch, missing) -> None:
    if sys.platform != "linux":
        missing("x11", "only X11 can lack a display")
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(BackendError, match="leave --show out"):
        WindowSink("camera")


def test_it_shows_the_overlay_and_may_be_closed(missing) -> None:
    if not os.environ.get("DISPLAY"):
        missing("display", "DISPLAY is not set; xvfb-run gives one")
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    result = Segmentation(mask=np.zeros((48, 64), np.uint8), classes=("road",), palette=((128, 64, 128),))
    frame = Frame(index=0, stamp=0, name="0", image=image)
    window = WindowSink("camera")
    window.write(frame, window.encode(frame, result))
    shown = [[window._picture.get(x, y) for x in range(64)] for y in range(48)]
    assert np.array_equal(np.array(shown)[..., ::-1], result.overlay(image))
    window.close()
    window.write(frame, window.encode(frame, result))  # whoever closes it goes on without
    window.close()
