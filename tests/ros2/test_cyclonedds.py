"""`ddsm ros2` as a process of its own, met over real DDS on this computer's loopback."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from ddsm_deploy.images import read_image
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.segmenter import Segmenter

FRAMES = sorted((Path(__file__).parent.parent.parent / "examples" / "frames").glob("*.jpg"))
SECONDS = 60.0


class Node:
    """A running `ddsm ros2` and what it says."""

    def __init__(self, dds: Any, *arguments: str | Path) -> None:
        from ddsm_deploy.ros2.cyclonedds import LOOPBACK

        command = [sys.executable, "-m", "ddsm_deploy", "ros2", *map(str, arguments)]
        command += ["--transport", "cyclonedds", "--domain", str(dds.DOMAIN), "--backend", "onnxruntime"]
        # whoever leaves without a word is missed after this time, longer than any test waits
        uri = LOOPBACK.replace("<Discovery>", "<Discovery><LeaseDuration>600s</LeaseDuration>")
        environment = {**os.environ, "CYCLONEDDS_URI": uri}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def says(self, words: str) -> str:
        """The next line with these words in it."""
        said = []
        with contextlib.suppress(queue.Empty):
            while True:
                said.append(self._lines.get(timeout=SECONDS))
                if words in said[-1]:
                    return said[-1]
        raise AssertionError(f"never said {words!r}, but: {said}")

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self._lines.put(line.rstrip("\n"))


@pytest.fixture(scope="module")
def dds(need) -> Iterator[Any]:
    """`dds_peer`, with DDS kept to loopback in this process and in those that it starts."""
    need("cyclonedds")
    import dds_peer

    from ddsm_deploy.ros2.cyclonedds import LOOPBACK

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CYCLONEDDS_URI", LOOPBACK)
        yield dds_peer


@pytest.fixture(scope="module")
def peer(dds: Any) -> Any:
    return dds.Peer()


@pytest.fixture(scope="module")
def start(dds: Any) -> Iterator[Callable[..., Node]]:
    """`start(*arguments)` starts a node; those that still run in the end are killed."""
    nodes: list[Node] = []

    def run(*arguments: str | Path) -> Node:
        nodes.append(Node(dds, *arguments))
        return nodes[-1]

    yield run
    for node in nodes:
        node.kill()


@pytest.fixture(scope="module")
def model(colour_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the tests may exchange under the node."""
    return Path(shutil.copy(colour_onnx, tmp_path_factory.mktemp("model") / "model.onnx"))


class Eyes:
    """The node that most tests share, with the camera's writer and readers of all that it publishes."""

    def __init__(self, dds: Any, peer: Any, node: Node) -> None:
        self.dds, self.node = dds, node
        self.camera = peer.writer("rt/robot/camera/image_raw", dds.Image)
        self.outputs = {
            name: peer.reader(f"rt/robot/eyes/{name}", dds.Image) for name in ("mask", "color", "confidence")
        }
        self.diagnostics = peer.reader("rt/diagnostics", dds.DiagnosticArray)
        self.requests = peer.writer("rq/robot/eyes/reloadRequest", dds.TriggerRequest)
        self.replies = peer.reader("rr/robot/eyes/reloadReply", dds.TriggerResponse)
        self._count = 0
        heard: set[str] = set()
        blank = np.zeros((8, 8, 3), np.uint8)

        def all_heard() -> bool:
            """Endpoints find each other at their own pace; what was sent before is gone."""
            self.camera.write(dds.image_message(blank, stamp=(0, 0)))
            heard.update(name for name, reader in self.outputs.items() for _ in dds.samples(reader))
            return len(heard) == 3

        dds.until(all_heard)
        dds.until(lambda: self.requests.get_matched_subscriptions() and self.replies.get_matched_publications())

    def sees(self, message: Any) -> dict[str, Any]:
        """What the node makes of one message: each output's message with its stamp."""
        self.camera.write(message)
        stamp = message.header.stamp
        same = lambda answer: (answer.header.stamp.sec, answer.header.stamp.nanosec) == (stamp.sec, stamp.nanosec)  # noqa: E731
        return {name: self.dds.first(reader, same) for name, reader in self.outputs.items()}

    def status(self, fits: Callable[[dict[str, str]], bool] = lambda _: True) -> Any:
        """The next diagnostics with such values."""
        return self.dds.first(self.diagnostics, lambda message: fits(values_of(message)))

    def reload(self) -> Any:
        self._count += 1
        self.requests.write(self.dds.TriggerRequest(0xDDB00000_00000001, self._count, 0))
        return self.dds.first(self.replies)


def values_of(message: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in message.status[0].values}


@pytest.fixture(scope="module")
def eyes(dds: Any, peer: Any, start: Callable[..., Node], model: Path) -> Eyes:
    node = start(
        "camera/image_raw", "--model", model, "--namespace", "/robot", "--node-name", "eyes",
        "--color", "--confidence", "--policy", "every", "--queue", "1000", "--reliable",
    )  # fmt: skip
    line = node.says("/robot/eyes on cyclonedds")
    assert f"domain {dds.DOMAIN}: /robot/camera/image_raw -> /robot/eyes/mask: colours (" in line
    return Eyes(dds, peer, node)


def pixels_of(message: Any) -> np.ndarray:
    shape = (message.height, message.width, message.step // message.width)
    return np.array(message.data, np.uint8).reshape(shape).squeeze()


def directly(model: Path, image: np.ndarray) -> Segmentation:
    with Segmenter.open(model, backend="onnxruntime") as segmenter:
        return segmenter.predict(image)


def test_masks_are_those_of_the_frames(dds: Any, eyes: Eyes, colour_onnx: Path) -> None:
    for number, path in enumerate(FRAMES[:3]):
        image = cv2.resize(read_image(path), (120, 90))
        seen = eyes.sees(
            dds.image_message(image, stamp=(1_700_000_000 + number, 999_999_999), frame_id=f"eye {number}")
        )
        expected = directly(colour_onnx, image)
        for name, pixels in (("mask", expected.mask), ("color", expected.color()), ("confidence", expected.confidence)):
            message = seen[name]
            assert (pixels_of(message) == pixels).all(), name
            assert message.header.frame_id == f"eye {number}"
            assert (message.height, message.width, message.is_bigendian) == (90, 120, 0)
        assert (seen["mask"].encoding, seen["mask"].step) == ("mono8", 120)
        assert (seen["color"].encoding, seen["color"].step) == ("bgr8", 360)


def test_damaged_messages_are_counted_and_survived(dds: Any, eyes: Eyes) -> None:
    image = np.full((9, 11, 3), 200, np.uint8)
    before = int(values_of(eyes.status())["damaged"])
    wrong = [dds.image_message(image, stamp=(5, 5)) for _ in range(3)]
    wrong[0].height += 1
    wrong[1].encoding = "32FC1"

    class NoText(dds.Image):  # type: ignore[misc,name-defined]
        def serialize(self, **options: Any) -> bytes:
            return bytes(super().serialize(**options).replace(b"camera", b"\xff\xfe\xfd\xfc\xfb\xfa"))

    wrong[2] = NoText(**vars(wrong[2]))
    for message in wrong:
        eyes.camera.write(message)
    assert eyes.sees(dds.image_message(image, stamp=(6, 6)))
    status = eyes.status(lambda values: int(values["damaged"]) >= before + 3)
    assert int(values_of(status)["damaged"]) == before + 3
    assert eyes.node.process.poll() is None
    assert "damaged message" in eyes.node.says("damaged")


def test_frames_of_programs_without_ros(dds: Any, peer: Any, eyes: Eyes, colour_onnx: Path) -> None:
    image = cv2.resize(read_image(FRAMES[4]), (36, 24))
    message = dds.image_message(image, stamp=(8, 8))
    native = dds.NativeImage(*vars(message).values())
    camera = peer.writer("rt/robot/camera/image_raw", dds.NativeImage)
    dds.until(camera.get_matched_subscriptions)

    def answer() -> Any:
        camera.write(native)
        return [mask for mask in dds.samples(eyes.outputs["mask"]) if mask.header.stamp == message.header.stamp]

    assert (pixels_of(dds.until(answer)[0]) == directly(colour_onnx, image).mask).all()


def test_diagnostics(dds: Any, eyes: Eyes) -> None:
    processed = int(values_of(eyes.status())["processed"])
    for number in range(3):
        eyes.sees(dds.image_message(np.zeros((8, 8, 3), np.uint8), stamp=(10, number)))

    def settled(values: dict[str, str]) -> bool:
        received, done, damaged = (int(values[key]) for key in ("received", "processed", "damaged"))
        return done >= processed + 3 and received == done + damaged

    message = eyes.status(settled)
    assert len(message.status) == 1
    assert message.status[0].name == "robot/eyes: segmentation"
    assert message.header.stamp.sec > 1_700_000_000
    values = values_of(message)
    assert (values["model"], values["backend"], values["precision"]) == ("colours", "onnxruntime", "fp32")
    assert (values["topic"], values["policy"]) == ("/robot/camera/image_raw", "every")
    assert (values["dropped"], values["failed"]) == ("0", "0")
    assert float(values["latency p50 (ms)"]) > 0


def test_reload_and_its_failure(dds: Any, eyes: Eyes, model: Path, colour_onnx: Path) -> None:
    from colour_graph import write_colour_model

    old = values_of(eyes.status())["sha256"]
    model.write_bytes(b"no model")
    reply = eyes.reload()
    assert (reply.client, reply.sequence_number, reply.success) == (0xDDB00000_00000001, 1, False)
    assert "reload failed" in reply.message and "the old model keeps running" in reply.message
    eyes.node.says("reload failed")
    image = cv2.resize(read_image(FRAMES[3]), (60, 40))
    expected = directly(colour_onnx, image).mask
    assert (pixels_of(eyes.sees(dds.image_message(image, stamp=(20, 0)))["mask"]) == expected).all()
    assert values_of(eyes.status())["sha256"] == old

    write_colour_model(model, size=(48, 48), confidence=True)
    reply = eyes.reload()
    assert (reply.sequence_number, reply.success) == (2, True)
    new = values_of(eyes.status(lambda values: values["sha256"] != old))["sha256"]
    assert new[:12] in reply.message
    mask = pixels_of(eyes.sees(dds.image_message(image, stamp=(21, 0)))["mask"])
    assert (mask == directly(model, image).mask).all()


def test_sigterm_is_a_clean_end(dds: Any, eyes: Eyes) -> None:
    """Last, for it ends the node that the others share."""
    assert eyes.node.end(signal.SIGTERM) == 0
    dds.until(lambda: not eyes.camera.get_matched_subscriptions())  # it took leave


def test_compressed_frames_and_ctrl_c(dds: Any, peer: Any, start: Callable[..., Node], colour_onnx: Path) -> None:
    node = start("/camera/compressed", "--model", colour_onnx)
    node.says("/ddsm on cyclonedds")
    camera = peer.writer("rt/camera/compressed", dds.CompressedImage)
    masks = peer.reader("rt/ddsm/mask", dds.Image)
    header = dds.Header(dds.Time(3, 4), "camera")
    data = FRAMES[0].read_bytes()

    def answer() -> Any:
        camera.write(dds.CompressedImage(header, "jpeg", data))  # the node asks for no repeats
        return list(dds.samples(masks))

    mask = dds.until(answer)[0]
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert (pixels_of(mask) == directly(colour_onnx, image).mask).all()
    assert (mask.header.stamp.sec, mask.header.stamp.nanosec, mask.header.frame_id) == (3, 4, "camera")
    assert node.end(signal.SIGINT) == 130


def test_an_error_is_one_line(need) -> None:
    need("cyclonedds")
    arguments = ["image", "--transport", "cyclonedds", "--model", "nowhere.onnx"]
    done = subprocess.run(
        [sys.executable, "-m", "ddsm_deploy", "ros2", *arguments], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ") and "nowhere.onnx" in line


def test_a_wrong_configuration_is_one_line(need, colour_onnx: Path) -> None:
    need("cyclonedds")
    arguments = ["image", "--transport", "cyclonedds", "--model", str(colour_onnx), "--backend", "onnxruntime"]
    done = subprocess.run(
        [sys.executable, "-m", "ddsm_deploy", "ros2", *arguments],
        env={**os.environ, "CYCLONEDDS_URI": "<CycloneDDS><Domain><Nonsense/></Domain></CycloneDDS>"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "look at CYCLONEDDS_URI" in done.stderr.splitlines()[-1]  # Cyclone DDS says its own word before
