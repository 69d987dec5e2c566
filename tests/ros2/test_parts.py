"""Names, options, counters and rare reports."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import pytest

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.ros2.options import NodeOptions
from ddsm_deploy.ros2.report import RareReport
from ddsm_deploy.ros2.run import chosen
from ddsm_deploy.ros2.statistics import Statistics


@pytest.mark.parametrize(
    ("topic", "namespace", "expected"),
    [
        ("/camera/image_raw", "/robot", "/camera/image_raw"),
        ("camera/image_raw", "/robot/left", "/robot/left/camera/image_raw"),
        ("camera", "/", "/camera"),
        ("~/camera", "robot", "/robot/eyes/camera"),
        ("~/camera", "/", "/eyes/camera"),
    ],
)
def test_names_are_resolved_as_ros_does(topic: str, namespace: str, expected: str) -> None:
    assert NodeOptions(topic=topic, namespace=namespace, name="eyes").input == expected


@pytest.mark.parametrize(
    ("topic", "given", "expected"),
    [
        ("/camera/compressed", None, True),
        ("/camera/image", None, False),
        ("/compressed", None, True),
        ("/camera/compressed", False, False),
        ("/camera/image", True, True),
    ],
)
def test_the_type_is_guessed_from_the_topic(topic: str, given: bool | None, expected: bool) -> None:
    assert NodeOptions(topic=topic, compressed=given).takes_compressed is expected


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"policy": "all"}, "policy is 'all'; expected every or latest"),
        ({"queue": 0}, "queue is 0"),
        ({"domain": 233}, "domain is 233; expected 0 to 232"),
        ({"name": "two words"}, "node name is 'two words'"),
        ({"name": "/eyes"}, "node name is '/eyes'"),
        ({"namespace": "/robot/"}, "namespace is 'robot/'"),
        ({"topic": "/camera//image"}, "topic is 'camera//image'"),
        ({"topic": "2d"}, "topic is '2d'"),
        ({"topic": ""}, "topic is ''"),
    ],
)
def test_wrong_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NodeOptions(**{"topic": "image", **wrong})


def test_transports_by_name() -> None:
    assert chosen("rclpy") == "rclpy"
    assert chosen("auto") == ("rclpy" if importlib.util.find_spec("rclpy") else "cyclonedds")
    with pytest.raises(ConfigError, match="transport is 'zenoh'; expected auto, rclpy or cyclonedds"):
        chosen("zenoh")


def test_latency_counts_from_the_arrival() -> None:
    statistics = Statistics()
    now = time.monotonic()
    for _ in range(98):
        statistics.processed(now - 2.0)
    for _ in range(2):
        statistics.processed(now - 50.0)
    window = statistics.window
    assert statistics.counts.processed == 100
    assert window.p50 is not None and 2_000 <= window.p50 < 50_000
    assert window.p99 is not None and window.p99 >= 50_000
    assert window.rate > 0


def test_no_frames_have_no_latency() -> None:
    window = Statistics().window
    assert (window.rate, window.p50, window.p99) == (0.0, None, None)


def test_reports_of_one_kind_are_rare_and_say_how_many_were_not_told() -> None:
    lines: list[str] = []
    now = 0.0
    report = RareReport(lines.append, clock=lambda: now)
    for kind, text, seconds in (
        ("damaged", "one", 0.0),
        ("damaged", "two", 1.0),
        ("failed", "three", 1.5),
        ("damaged", "four", 4.9),
        ("damaged", "five", 5.0),
        ("damaged", "six", 10.0),
    ):
        now = seconds
        report(kind, text)
    assert lines == ["one", "three", "five (2 more of this kind before)", "six"]
