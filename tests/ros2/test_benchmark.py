"""What `benchmarks/ros2_dds.py` makes of what its processes saw; the run itself takes a quiet machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, need) -> Any:
    need("cyclonedds")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("ros2_dds")


def test_sent_and_received_are_joined_by_the_stamp(script: Any) -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4]
    masks = [  # frame, arrival, whether it is that frame's mask
        (0, 0.02, True),
        (1, 0.14, True),
        (3, 0.70, False),
        (None, 0.71, False),
        (4, 0.80, True),
        (4, 0.81, True),
    ]
    result = script.joined(times, masks)
    assert {key: result[key] for key in ("sent", "received", "matched", "mismatched", "twice", "missing")} == {
        "sent": 5, "received": 6, "matched": 3, "mismatched": 2, "twice": 1, "missing": 2,
    }  # fmt: skip
    assert result["latency_ms"]["p50"] == pytest.approx((40 + 400) / 2)  # of 20, 40, 400 and 410
    assert result["latency_ms"]["max"] == pytest.approx(410)
    assert result["longest_gap_seconds"] == pytest.approx(0.56)
    assert result["sent_rate"] == pytest.approx(10)


def test_nothing_received(script: Any) -> None:
    result = script.joined([0.0, 0.1], [])
    assert (result["matched"], result["missing"], result["latency_ms"]["p50"]) == (0, 2, None)


def test_a_mask_is_compared_whole(script: Any) -> None:
    import numpy as np

    messages = importlib.import_module("ddsm_deploy.ros2.messages")
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    header = messages.Header(messages.Time(0, 0), "")
    same = messages.Image(header, 3, 4, "mono8", 0, 4, mask.tobytes())
    assert script._equal(same, mask)
    for field, value in (("encoding", "bgr8"), ("height", 4), ("data", bytes([1]) + mask.tobytes()[1:])):
        assert not script._equal(messages.Image(**{**vars(same), field: value}), mask)
