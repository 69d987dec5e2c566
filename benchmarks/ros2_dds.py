"""A camera, the node and a subscriber of its masks as three processes, talking DDS over this computer's loopback.

    python benchmarks/ros2_dds.py --images examples/frames --rate 30 --seconds 300 --size 360x480 --json ros2.json

The camera publishes raw images (bgr8) of a few pictures in turn, each with a stamp of its own. The subscriber checks
every mask that comes back: its stamp must be one that was sent, and its pixels those that the same model on the same
backend gives for the picture sent under that stamp. Latency is from before the image's serialization to the mask's
arrival in Python. `--kill-after S` kills the node without warning after S seconds of frames and starts it again at
once: the stream must go on, and `longest_gap_seconds` says how long it stood still.

`missing` are frames sent without a mask: dropped by the node (it counts them itself, see `node`), lost by DDS (by
default the node asks for no repeats; with `--reliable` it does), or sent while the node was dead.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.domain import DomainParticipant
from cyclonedds.internal import InvalidSample
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.images import SUFFIXES, read_image
from ddsm_deploy.ros2.cyclonedds import LOOPBACK, qos_of
from ddsm_deploy.ros2.messages import DiagnosticArray, Header, Image, Time
from ddsm_deploy.runtime.segmenter import Segmenter

TOPIC, NODE = "/camera/image_raw", "ddsm"
FIRST_SECOND = 1_700_000_000
"""Stamps are this and the frame's number in milliseconds, so that a stamp says which frame it is."""

QUIET_SECONDS = 3.0
"""The subscriber waits so long for a last mask."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all processes know."""

    images: Path
    size: tuple[int, int]
    rate: float
    seconds: float
    domain: int
    model: str
    backend: str
    precision: str | None
    distinct: int

    def pictures(self) -> list[np.ndarray]:
        """The distinct pictures, uint8 H×W×3, BGR."""
        paths = sorted(path for path in self.images.rglob("*") if path.suffix.lower() in SUFFIXES)
        picked = [paths[i * len(paths) // self.distinct] for i in range(min(self.distinct, len(paths)))]
        return [cv2.resize(read_image(path), self.size[::-1], interpolation=cv2.INTER_AREA) for path in picked]


def main() -> None:
    args = _arguments()
    os.environ.setdefault("CYCLONEDDS_URI", LOOPBACK)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**fields)
    result = {**measure(settings, args), "settings": {**fields, "images": str(args.images)}, "machine": machine_facts()}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


def measure(settings: Settings, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the three processes and joins what they saw."""
    context = multiprocessing.get_context("spawn")
    sent, seen = context.Queue(), context.Queue()
    ready, begun, done = context.Event(), context.Event(), context.Event()
    node = Node(settings, args)
    subscriber = context.Process(target=subscribe, args=(settings, ready, done, seen))
    camera = context.Process(target=publish, args=(settings, begun, sent))
    try:
        subscriber.start()
        _wait(ready, subscriber)
        camera.start()
        if args.kill_after is not None:
            _wait(begun, camera)
            time.sleep(args.kill_after)
            node.kill_and_restart()
        times = _from(sent, camera)
        done.set()
        masks, status = _from(seen, subscriber)
        return {**joined(times, masks), **node.told(), "node": status}
    finally:
        for process in (camera, subscriber):
            if process.is_alive():
                process.terminate()
            if process.pid is not None:
                process.join()
        node.end()


def publish(settings: Settings, begun: Any, sent: Any) -> None:
    """The camera's process: gives the times at which frames were sent, seconds of the monotonic clock."""
    pictures = settings.pictures()
    height, width = settings.size
    participant = DomainParticipant(settings.domain)
    writer = DataWriter(participant, Topic(participant, f"rt{TOPIC}", Image), qos_of(Image, depth=10, reliable=True))
    until = time.monotonic() + 60
    while not writer.get_matched_subscriptions():
        if time.monotonic() > until:
            raise TimeoutError("the node does not listen")
        time.sleep(0.05)
    begun.set()
    times: list[float] = []
    start = time.monotonic()
    for number in range(round(settings.rate * settings.seconds)):
        time.sleep(max(0.0, start + number / settings.rate - time.monotonic()))
        header = Header(Time(FIRST_SECOND + number // 1000, number % 1000 * 1_000_000), "camera")
        data = pictures[number % len(pictures)].tobytes()
        times.append(time.monotonic())
        writer.write(Image(header, height, width, "bgr8", 0, 3 * width, data))
    sent.put(times)


def subscribe(settings: Settings, ready: Any, done: Any, seen: Any) -> None:
    """The subscriber's process: gives each mask's frame (None: unknown), arrival and verdict, and the last status."""
    with Segmenter.open(settings.model, backend=settings.backend, precision=settings.precision) as segmenter:
        expected = [segmenter.predict(picture).mask for picture in settings.pictures()]
    for index, mask in enumerate(expected):
        if any((mask == other).all() for other in expected[:index]):
            raise ValueError("two pictures have the same mask, so that mixing them up would not show; take others")
    participant = DomainParticipant(settings.domain)
    masks = _reader(participant, f"rt/{NODE}/mask", Image)
    statuses = _reader(participant, "rt/diagnostics", DiagnosticArray)
    while not masks.get_matched_publications():
        time.sleep(0.05)
    ready.set()
    waiting = WaitSet(participant)
    for reader in (masks, statuses):
        waiting.attach(ReadCondition(reader, SampleState.Any | ViewState.Any | InstanceState.Any))
    found: list[tuple[int | None, float, bool]] = []
    status: dict[str, str] = {}
    last = time.monotonic()
    while not done.is_set() or time.monotonic() - last < QUIET_SECONDS:
        waiting.wait(duration(milliseconds=200))
        for message in _samples(statuses):
            status = {entry.key: entry.value for entry in message.status[0].values}
        for message in _samples(masks):
            last = time.monotonic()
            number = (message.header.stamp.sec - FIRST_SECOND) * 1000 + message.header.stamp.nanosec // 1_000_000
            known = 0 <= number < settings.rate * settings.seconds and message.header.frame_id == "camera"
            found.append((number if known else None, last, known and _equal(message, expected[number % len(expected)])))
    seen.put((found, status))


def joined(times: list[float], masks: list[tuple[int | None, float, bool]]) -> dict[str, Any]:
    """What was sent beside what came back."""
    latencies = [1e3 * (at - times[number]) for number, at, right in masks if right and number is not None]
    matched = {number for number, _, right in masks if right}
    arrivals = [at for _, at, _ in masks]
    p50, p99 = np.percentile(latencies, (50, 99)) if latencies else (None, None)
    return {
        "sent": len(times),
        "received": len(masks),
        "matched": len(matched),
        "mismatched": sum(not right for _, _, right in masks),
        "twice": sum(count - 1 for count in collections.Counter(n for n, _, _ in masks if n is not None).values()),
        "missing": len(times) - len(matched),
        "latency_ms": {"p50": p50, "p99": p99, "max": max(latencies, default=None)},
        "sent_rate": (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        "longest_gap_seconds": max((b - a for a, b in itertools.pairwise(arrivals)), default=None),
    }


class Node:
    """The node's process: `ddsm ros2`, as a user starts it."""

    def __init__(self, settings: Settings, args: argparse.Namespace) -> None:
        options = ["--model", settings.model, "--backend", settings.backend, "--policy", args.policy]
        options += ["--precision", settings.precision] if settings.precision else []
        options += ["--reliable"] if args.reliable else []
        options += ["--transport", "cyclonedds", "--domain", str(settings.domain), "--node-name", NODE]
        self._command = [sys.executable, "-m", "ddsm_deploy", "ros2", TOPIC, *options]
        self._memory: list[list[float]] = []
        self._restarted: float | None = None
        self._process = self._started()
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._watch_memory, daemon=True)
        self._watch.start()

    def kill_and_restart(self) -> None:
        """SIGKILL, and the same command again."""
        self._process.kill()
        self._process.wait()
        self._restarted = time.monotonic()
        self._process = self._started()

    def end(self) -> None:
        """As a supervisor ends it."""
        self._over.set()
        self._watch.join()
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def told(self) -> dict[str, Any]:
        """Resident memory at the first and at the last reading of each process, megabytes."""
        return {"killed": self._restarted is not None, "memory_mb": [[r[0], max(r), r[-1]] for r in self._memory if r]}

    def _started(self) -> subprocess.Popen[bytes]:
        self._memory.append([])
        return subprocess.Popen(self._command)

    def _watch_memory(self) -> None:
        """Reads it every 2 s, from the 10th second of each process on."""
        began, process = time.monotonic(), self._process
        while not self._over.wait(2.0):
            if process is not self._process:
                began, process = time.monotonic(), self._process
            if time.monotonic() - began > 10.0:
                try:
                    pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="utf-8").split()[1])
                except OSError:  # it was killed just now
                    continue
                self._memory[-1].append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))


def _equal(message: Image, mask: np.ndarray) -> bool:
    if (message.encoding, message.height, message.width) != ("mono8", *mask.shape):
        return False
    return bool((np.frombuffer(message.data, np.uint8).reshape(mask.shape) == mask).all())


def _reader(participant: DomainParticipant, topic: str, kind: type[Any]) -> DataReader[Any]:
    return DataReader(participant, Topic(participant, topic, kind), qos_of(kind, depth=50, reliable=True))


def _samples(reader: DataReader[Any]) -> Iterator[Any]:
    return (sample for sample in reader.take(N=100) if not isinstance(sample, InvalidSample))


def _wait(event: Any, process: Any) -> None:
    while not event.wait(0.2):
        if not process.is_alive():
            raise RuntimeError("a process ended before it was ready; its error is above")


def _from(channel: Any, process: Any) -> Any:
    while process.is_alive() or not channel.empty():
        with contextlib.suppress(queue.Empty):
            return channel.get(timeout=0.5)
    raise RuntimeError("a process ended without a result; its error is above")


def _size(text: str) -> tuple[int, int]:
    height, width = (int(side) for side in text.lower().split("x"))
    return height, width


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder to take pictures from")
    parser.add_argument("--distinct", type=int, default=6, help="how many of them")
    parser.add_argument("--size", type=_size, default=(360, 480), help="HEIGHTxWIDTH of what is published")
    parser.add_argument("--rate", type=float, default=30.0, help="frames a second")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--kill-after", type=float, help="seconds until the node is killed and started again")
    parser.add_argument("--model", default="ddsm-lite0")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision")
    parser.add_argument("--policy", default="latest")
    parser.add_argument("--reliable", action="store_true")
    parser.add_argument("--domain", type=int, default=71)
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
