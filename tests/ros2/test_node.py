"""The node's own logic, with a transport that keeps what it is given: no network, and every step at the test's pace."""

from __future__ import annotations

import shutil
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from colour_graph import colour_graph, colour_spec

from ddsm_deploy.errors import ArtifactError, BackendError, InputError
from ddsm_deploy.ros2.node import Picture, SegmentationNode
from ddsm_deploy.ros2.options import NodeOptions
from ddsm_deploy.ros2.status import ERROR, OK, WARN, Status
from ddsm_deploy.runtime.segmenter import Segmenter

SECONDS = 60.0
SIZE = (64, 96)


class KeptTransport:
    """A transport whose network is a list. While `held`, `publish` takes no picture."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []
        self.lines: list[str] = []
        self.statuses: list[Status] = []
        self.error: Exception | None = None
        self.in_time = True
        self._changed = threading.Condition()
        self._held = False
        self._knocking = 0

    def start(self) -> None: ...

    def publish(self, picture: Picture) -> bool:
        with self._changed:
            self._knocking += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._held)
            if self.error is not None:
                raise self.error
            self.pictures.append(picture)
            self._changed.notify_all()
            return self.in_time

    def publish_status(self, status: Status) -> None:
        self.statuses.append(status)

    def report(self, text: str) -> None:
        with self._changed:
            self.lines.append(text)
            self._changed.notify_all()

    def close(self) -> None: ...

    def hold(self, held: bool) -> None:
        with self._changed:
            self._held = held
            self._changed.notify_all()

    def until(self, look: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(look, timeout=SECONDS)

    def until_pictures(self, count: int) -> None:
        self.until(lambda: len(self.pictures) >= count)

    def until_knocks(self, count: int) -> None:
        self.until(lambda: self._knocking >= count)


def message(number: int, **changes: Any) -> types.SimpleNamespace:
    """An image message; its stamp is its number."""
    pixels = picture(number)
    fields = {
        "header": types.SimpleNamespace(stamp=number, frame_id="camera"),
        "height": SIZE[0],
        "width": SIZE[1],
        "encoding": "bgr8",
        "is_bigendian": 0,
        "step": 3 * SIZE[1],
        "data": pixels.tobytes(),
    }
    return types.SimpleNamespace(**{**fields, **changes})


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def classes_of(pixels: np.ndarray) -> np.ndarray:
    """What the colour model says: red, green or blue, whichever is strongest."""
    return np.argmax(pixels[..., ::-1], axis=2)


def stamps(transport: KeptTransport) -> list[int]:
    return [kept.header.stamp for kept in transport.pictures]


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[SegmentationNode, KeptTransport]]]:
    """`started(model, **options)`: a node at work, and its transport."""
    nodes = []

    def start(model: Path, **options: Any) -> tuple[SegmentationNode, KeptTransport]:
        fields = {"topic": "/camera/image", "model": str(model), "backend": "onnxruntime", **options}
        node, transport = SegmentationNode(NodeOptions(**fields)), KeptTransport()
        node.start(transport)
        nodes.append((node, transport))
        return node, transport

    yield start
    for node, transport in nodes:
        transport.hold(False)
        node.close()


def test_every_output_of_a_frame(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx, color=True, confidence=True)
    sent = message(1)
    node.offer(sent)
    transport.until_pictures(3)
    mask, color, confidence = transport.pictures
    assert all(kept.header is sent.header for kept in transport.pictures)
    assert [(kept.output, kept.encoding) for kept in transport.pictures] == [
        ("mask", "mono8"), ("color", "bgr8"), ("confidence", "mono8"),
    ]  # fmt: skip
    expected = classes_of(picture(1))
    assert (mask.pixels == expected).all()
    palette = np.array([[0, 0, 255], [0, 255, 0], [255, 0, 0]])  # of the colour model, BGR
    assert (color.pixels == palette[expected]).all()
    assert (confidence.pixels == picture(1).max(axis=2)).all()
    assert all(kept.pixels.flags.c_contiguous for kept in transport.pictures)


def test_latest_drops_the_older_waiting_frame(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx)
    transport.hold(True)
    node.offer(message(0))
    transport.until_knocks(1)  # 0 is being worked on, so that the next ones wait
    for number in (1, 2, 3):
        node.offer(message(number))
    transport.hold(False)
    transport.until_pictures(2)
    assert stamps(transport) == [0, 3]
    assert (transport.pictures[1].pixels == classes_of(picture(3))).all()
    counts = node.statistics.counts
    assert (counts.received, counts.dropped) == (4, 2)


def test_every_lets_frames_queue_and_counts_what_overflows(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx, policy="every", queue=3)
    transport.hold(True)
    node.offer(message(0))
    transport.until_knocks(1)
    for number in range(1, 6):
        node.offer(message(number))
    assert node.status().level == WARN, "dropping is none of this policy's business"
    transport.hold(False)
    transport.until_pictures(4)
    assert stamps(transport) == [0, 3, 4, 5]
    assert node.statistics.counts.dropped == 2


def test_offering_never_waits_for_inference(started, colour_onnx: Path) -> None:
    """A thousand frames are taken over while none can be published, and all but the one in hand and the one that waits
    are let go."""
    node, transport = started(colour_onnx)
    transport.hold(True)
    node.offer(message(0))
    transport.until_knocks(1)
    late = message(1)
    for _ in range(1000):
        node.offer(late)
    assert node.statistics.counts.dropped == 999


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (message(0, encoding="32FC1"), "encoding is '32FC1'"),
        (message(0, step=5), "in rows of 5"),
        (message(0, height=0), "image of 96x0"),
        (message(0, data=b""), "0 bytes"),
        (InputError("no message at all"), "no message at all"),
    ],
    ids=["encoding", "step", "height", "data", "unread"],
)
def test_a_damaged_message_is_counted_and_told(started, colour_onnx: Path, wrong: Any, words: str) -> None:
    node, transport = started(colour_onnx, policy="every")
    for sent in (wrong, wrong, message(7)):
        node.offer(sent)
    transport.until_pictures(1)
    assert stamps(transport) == [7]
    counts = node.statistics.counts
    assert (counts.received, counts.damaged) == (3, 2)
    (line,) = transport.lines  # the second within seconds is not told
    assert words in line
    status = node.status()
    assert (status.level, status.message) == (WARN, "2 damaged messages")


def test_compressed_images(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx, topic="camera/compressed", policy="every")
    data = cv2.imencode(".png", picture(3))[1].tobytes()
    header = types.SimpleNamespace(stamp=3, frame_id="camera")
    node.offer(types.SimpleNamespace(header=header, format="png", data=data[:100]))
    node.offer(types.SimpleNamespace(header=header, format="png", data=data))
    transport.until_pictures(1)
    assert (transport.pictures[0].pixels == classes_of(picture(3))).all()
    assert node.statistics.counts.damaged == 1


def test_a_mask_that_is_not_taken_in_time_counts_as_dropped(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx)
    transport.in_time = False
    node.offer(message(0))
    transport.until(lambda: bool(transport.lines))
    counts = node.statistics.counts
    assert (counts.processed, counts.dropped) == (0, 1)
    assert "does not keep up" in transport.lines[0]


def test_a_failing_runtime_does_not_end_the_node(started, tmp_path: Path, need) -> None:
    """A graph that takes any height, and fails where the mask is no multiple of 64×96 pixels."""
    need("onnx")
    import onnx
    from onnx import helper, numpy_helper

    model = colour_graph(colour_spec(size=SIZE), dynamic=True)
    model.graph.node[-1].output[0] = "flat"
    model.graph.node.append(helper.make_node("Reshape", ["flat", "shape"], ["mask"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, *SIZE], np.int64), "shape"))
    path = tmp_path / "picky.onnx"
    onnx.save(model, path)

    node, transport = started(path, policy="every")
    low = message(0, height=SIZE[0] - 1)
    low.data = low.data[: -3 * SIZE[1]]
    for sent in (low, message(1)):
        node.offer(sent)
    transport.until_pictures(1)
    assert stamps(transport) == [1]
    assert node.statistics.counts.failed == 1
    assert "inference failed" in transport.lines[0]
    assert node.status().level == ERROR


def test_status(started, colour_onnx: Path) -> None:
    node, transport = started(colour_onnx, name="eyes", namespace="/robot")
    assert (node.status().level, node.status().message) == (WARN, "no frames")
    for number in range(3):
        node.offer(message(number))
        transport.until_pictures(number + 1)
    transport.until(lambda: node.statistics.counts.processed == 3)
    status = node.status()
    assert (status.level, status.name) == (OK, "robot/eyes: segmentation")
    values = dict(status.values)
    with Segmenter.open(colour_onnx, backend="onnxruntime") as segmenter:
        from ddsm_deploy.runtime.pipeline import identity_of

        assert values["sha256"] == identity_of(segmenter).sha256
    assert {key: values[key] for key in ("received", "processed", "dropped", "damaged", "failed")} == {
        "received": "3", "processed": "3", "dropped": "0", "damaged": "0", "failed": "0",
    }  # fmt: skip
    assert (values["model"], values["backend"], values["precision"]) == ("colours", "onnxruntime", "fp32")
    assert (values["topic"], values["policy"]) == ("/camera/image", "latest")
    assert float(values["rate"]) > 0
    assert 0 < float(values["latency p50 (ms)"]) <= float(values["latency p99 (ms)"])


def test_reload_takes_the_new_file(started, tmp_path: Path, colour_onnx: Path) -> None:
    from colour_graph import write_colour_model

    path = tmp_path / "model.onnx"
    shutil.copy(colour_onnx, path)
    node, transport = started(path)
    before = dict(node.status().values)["sha256"]
    node.offer(message(0))
    transport.until_pictures(1)
    write_colour_model(path, size=SIZE, channel_order="rgb")  # another file with the same masks
    success, text = node.reload()
    assert success
    after = dict(node.status().values)["sha256"]
    assert after != before
    assert after[:12] in text
    node.offer(message(1))
    transport.until_pictures(2)
    assert (transport.pictures[1].pixels == classes_of(picture(1))).all()


def test_a_failed_reload_keeps_the_old_model(started, tmp_path: Path, colour_onnx: Path) -> None:
    path = tmp_path / "model.onnx"
    shutil.copy(colour_onnx, path)
    node, transport = started(path)
    before = dict(node.status().values)["sha256"]
    for damage in (b"no model", path.read_bytes()[:200], None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        success, text = node.reload()
        assert not success
        assert str(path) in text and "the old model keeps running" in text
        assert dict(node.status().values)["sha256"] == before
        if damage is None:
            break
    node.offer(message(0))
    transport.until_pictures(1)
    assert (transport.pictures[0].pixels == classes_of(picture(0))).all()


def test_a_model_without_confidence_is_refused_at_once(tmp_path: Path, need) -> None:
    need("onnxruntime")
    from colour_graph import write_colour_model

    path = write_colour_model(tmp_path / "plain.onnx", size=SIZE)
    with pytest.raises((ArtifactError, BackendError), match="confidence"):
        SegmentationNode(NodeOptions(topic="x", model=str(path), backend="onnxruntime", confidence=True))


def test_a_bug_ends_the_node_and_is_raised(colour_onnx: Path) -> None:
    node = SegmentationNode(NodeOptions(topic="x", model=str(colour_onnx), backend="onnxruntime"))
    transport = KeptTransport()
    transport.error = ZeroDivisionError("a bug")
    node.start(transport)
    node.offer(message(0))
    assert node.stop.wait(SECONDS)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        node.close()
