"""A stream's outputs hold each frame once, in order, with its stamp, however often the run was killed."""

from __future__ import annotations

import errno
import json
import os
import random
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
import pytest
from recordings import mask_of, picture, stamp_of, write_bag, write_video

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.outputs import Products
from ddsm_deploy.runtime.recording import StreamOptions, StreamSummary, segment_stream
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sinks.bag import MASK_TOPIC, BagSink
from ddsm_deploy.runtime.sinks.base import PARTS_FOLDER, Sink
from ddsm_deploy.runtime.sinks.files import FilesSink
from ddsm_deploy.runtime.sinks.lines import LinesSink
from ddsm_deploy.runtime.sinks.video import VideoSink
from ddsm_deploy.streams.frames import BaseSource, Frame
from ddsm_deploy.streams.sources import open_source

CHILD = Path(__file__).parent / "stream_child.py"


@pytest.fixture(autouse=True)
def _packages(need) -> None:
    for module in ("rosbags", "av"):
        need(module)


@pytest.fixture(scope="module")
def segmenter(colour_onnx: Path) -> Iterator[Segmenter]:
    with Segmenter.open(colour_onnx, backend="onnxruntime", threads=1) as opened:
        yield opened


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "frames.jsonl").read_text().splitlines()]


def masks_in(bag: Path) -> list[tuple[int, int, str, np.ndarray]]:
    """Stamp, time of recording, frame_id and mask of each message."""
    from rosbags.highlevel import AnyReader
    from rosbags.typesys import Stores, get_typestore

    found = []
    with AnyReader([bag], default_typestore=get_typestore(Stores.ROS2_HUMBLE)) as reader:
        for connection, received, data in reader.messages():
            assert connection.topic == MASK_TOPIC
            message = reader.deserialize(data, connection.msgtype)
            assert (message.encoding, message.step) == ("mono8", message.width)
            stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
            mask = message.data.reshape(message.height, message.width)
            found.append((stamp, received, message.header.frame_id, mask))
    return found


def pictures_in(video: Path) -> list[tuple[float, np.ndarray]]:
    """Presentation time in seconds, and picture, of each frame."""
    import av

    with av.open(str(video)) as file:
        return [
            (float(frame.pts * frame.time_base), frame.to_ndarray(format="bgr24")) for frame in file.decode(video=0)
        ]


def overlay_of(index: int, segmenter: Segmenter) -> np.ndarray:
    return segmenter.predict(picture(index)).overlay(picture(index))


def assert_complete(output: Path, indices: list[int], segmenter: Segmenter) -> None:
    """Each sink of `stream_child` has each of these frames once, in order, as it should be."""
    assert [line["index"] for line in lines(output)] == indices
    assert [line["stamp"] for line in lines(output)] == [stamp_of(i) for i in indices]
    masks = masks_in(output / "bag")
    assert [(stamp, received) for stamp, received, _, _ in masks] == [
        (stamp_of(i), stamp_of(i) + 5_000_000) for i in indices
    ]
    assert all(name == "camera" for _, _, name, _ in masks)
    assert all(np.array_equal(mask, mask_of(picture(i))) for i, (*_, mask) in zip(indices, masks, strict=True))
    assert sorted(path.name for path in (output / "masks").iterdir()) == [f"{i:08d}.png" for i in indices]
    shown = pictures_in(output / "overlay.mp4")
    since = [(stamp_of(i) - stamp_of(indices[0])) / 1e9 for i in indices]
    assert [time for time, _ in shown] == pytest.approx(since, abs=1e-4)
    for i, (_, image) in zip(indices, shown, strict=True):
        # another frame's overlay differs by some 60; the codec's own error is a tenth of it
        assert np.abs(image.astype(int) - overlay_of(i, segmenter)).mean() < 15
    assert not (output / PARTS_FOLDER).exists()


def test_killed_at_random_and_resumed(colour_onnx: Path, segmenter: Segmenter, tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, b"short" if i in (3, 70) else picture(i)) for i in range(120)])
    good = [i for i in range(120) if i not in (3, 70)]
    output = tmp_path / "out"
    command = [sys.executable, str(CHILD), str(colour_onnx), str(tmp_path / "drive"), str(output)]
    numbers = random.Random(time.time_ns())
    reached, kills = [0], 0
    while kills < 3:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            journal = output / "ddsm-stream.json"
            until = time.monotonic() + 60
            while time.monotonic() < until and child.poll() is None:  # killed some time after it got further
                if journal.exists() and json.loads(journal.read_text())["next"] > reached[-1]:
                    time.sleep(numbers.uniform(0, 0.15))
                    break
                time.sleep(0.005)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        kills += 1
        reached.append(json.loads(journal.read_text())["next"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    skipped, made, damaged = map(int, done.stdout.split())
    assert skipped == reached[-1] > 0, reached
    assert skipped + made + damaged == 120
    assert_complete(output, good, segmenter)
    progress = json.loads((output / "ddsm-stream.json").read_text())
    assert (progress["done"], progress["damaged"], progress["finished"]) == (118, 2, True)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.stdout.split() == ["120", "0", "0"]
    assert_complete(output, good, segmenter)


def four(output: Path) -> dict[str, Sink]:
    parts = output / PARTS_FOLDER
    return {
        "files": FilesSink(output, Products()),
        "lines": LinesSink(output / "frames.jsonl"),
        "bag": BagSink(output / "bag", parts / "bag"),
        "video": VideoSink(output / "overlay.mp4", parts / "video"),
    }


def test_a_kill_while_files_are_joined(segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    """At each step of the joining: the next run makes the same files."""
    from ddsm_deploy.runtime.sinks import base

    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(6)])
    options = StreamOptions(output=tmp_path / "out")

    def run() -> None:
        segment_stream(open_source(str(tmp_path / "drive")), segmenter, four(options.output), options)

    steps = {
        "before the bag": (BagSink, "finish"),
        "before its parts go": (base.Parts, "clear"),
        "while they go": (base, "_remove"),
        "before the video": (VideoSink, "finish"),
    }
    for owner, name in steps.values():

        def killed(*_: object) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                run()
    run()
    assert_complete(options.output, list(range(6)), segmenter)


class Killed(BaseException):
    pass


def test_asked_to_stop_it_goes_on_later(segmenter: Segmenter, tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(30)])
    output, stop = tmp_path / "out", threading.Event()

    def progress(summary: StreamSummary) -> None:
        if summary.done == 7:
            stop.set()

    def run(**more: object) -> StreamSummary:
        source = open_source(str(tmp_path / "drive"))
        return segment_stream(source, segmenter, four(output), StreamOptions(output=output), **more)  # type: ignore[arg-type]

    first = run(progress=progress, stop=stop)
    assert first.interrupted and 7 <= first.done < 30
    assert not (output / "bag").exists()  # not joined yet
    second = run()
    assert (second.skipped, second.done, second.interrupted) == (first.done, 30 - first.done, False)
    assert_complete(output, list(range(30)), segmenter)


def test_only_so_many_frames(segmenter: Segmenter, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", [picture(i) for i in range(20)])
    output = tmp_path / "out"
    summary = segment_stream(
        open_source(str(tmp_path / "a.mkv")), segmenter, four(output), StreamOptions(output=output, max_frames=5)
    )
    assert summary.done == 5 and len(pictures_in(output / "overlay.mp4")) == 5
    assert [mask.shape for *_, mask in masks_in(output / "bag")] == [(64, 96)] * 5


class Live(BaseSource):
    """A camera that gives ten frames and is switched off."""

    live = True
    name = "camera 0"

    def _frames(self, start: int) -> Iterator[Frame]:
        for index in range(10):
            stamp = stamp_of(index)
            yield Frame(
                index=index,
                stamp=stamp,
                received=stamp + 5_000_000,
                name=str(index),
                frame_id="camera",
                image=picture(index),
            )


def test_a_live_source_has_no_past(segmenter: Segmenter, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = StreamOptions(output=output, policy="every")
    assert segment_stream(Live(), segmenter, four(output), options).done == 10
    with pytest.raises(ConfigError, match="no past"):
        segment_stream(Live(), segmenter, four(output), options)
    latest = StreamOptions(output=output, overwrite=True)
    summary = segment_stream(Live(), segmenter, four(output), latest)
    assert summary.done + summary.dropped == 10
    assert [line["index"] for line in lines(output)][-1] == 9


def test_so_many_frames_in_all(segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    """Not so many more after a kill, be it after the last of them."""
    monkeypatch.setattr("ddsm_deploy.runtime.recording.COMMIT_SECONDS", 0.0)
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(10)])
    options = StreamOptions(output=tmp_path / "out", max_frames=5)
    done = []
    for killed_after in (3, 2, 99):

        def progress(summary: StreamSummary, last: int = killed_after) -> None:
            if summary.done == last:
                raise Killed

        try:
            run = segment_stream(
                open_source(str(tmp_path / "drive")), segmenter, four(options.output), options, progress=progress
            )
            done.append(run.done)
        except Killed:
            done.append(killed_after)
    assert done == [3, 2, 0]
    assert_complete(options.output, list(range(5)), segmenter)


def test_what_is_made_anew_holds_nothing_of_what_was(segmenter: Segmenter, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "masks").mkdir(parents=True)
    (output / "masks" / "00000077.png").touch()  # somebody's own
    write_bag(tmp_path / "drive", [(0, picture(0))])
    with pytest.raises(ConfigError, match="masks is there already, and no record tells"):
        segment_stream(open_source(str(tmp_path / "drive")), segmenter, four(output), StreamOptions(output=output))
    (output / "masks" / "00000077.png").unlink()
    for name, count in {"a": 6, "b": 3}.items():
        write_bag(tmp_path / name, [(i, picture(i)) for i in range(count)])
        options = StreamOptions(output=output, overwrite=name == "b")
        segment_stream(open_source(str(tmp_path / name)), segmenter, four(output), options)
        masks = sorted(int(path.stem) for path in (output / "masks").iterdir())
        assert masks == ([0, 1, 2, 3, 4, 5] if name == "a" else [0, 1, 2])


def test_a_kill_right_after_overwriting_began(segmenter: Segmenter, tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(5)])
    output = tmp_path / "out"

    def run() -> StreamSummary:
        source = open_source(str(tmp_path / "drive"))
        return segment_stream(source, segmenter, four(output), StreamOptions(output=output))

    def killed(_: StreamSummary) -> None:
        raise Killed

    run()
    with pytest.raises(Killed):
        segment_stream(
            open_source(str(tmp_path / "drive")),
            segmenter,
            four(output),
            StreamOptions(output=output, overwrite=True),
            progress=killed,
        )
    assert run().done == 5
    assert_complete(output, list(range(5)), segmenter)


@pytest.mark.parametrize("given", [0, 4])
def test_a_live_source_that_fails_has_its_files_finished(segmenter: Segmenter, tmp_path: Path, given: int) -> None:
    class Unplugged(Live):
        def _frames(self, start: int) -> Iterator[Frame]:
            yield from (frame for frame in super()._frames(0) if frame.index < given)
            raise InputError("unplugged")

    output = tmp_path / "out"
    options = StreamOptions(output=output, policy="every")
    with pytest.raises(InputError, match="unplugged"):
        segment_stream(Unplugged(), segmenter, four(output), options)
    if given:
        assert_complete(output, list(range(given)), segmenter)
        assert not (output / PARTS_FOLDER).exists()
        with pytest.raises(ConfigError, match="no past"):
            segment_stream(Live(), segmenter, four(output), options)
    else:  # nothing is lost by going on
        assert segment_stream(Live(), segmenter, four(output), options).done == 10
        assert_complete(output, list(range(10)), segmenter)


def test_a_live_run_that_was_killed_has_its_files_finished(segmenter: Segmenter, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ddsm_deploy.runtime.recording.COMMIT_SECONDS", 0.0)
    output = tmp_path / "out"
    options = StreamOptions(output=output, policy="every")

    def progress(summary: StreamSummary) -> None:
        if summary.done == 4:
            raise Killed

    with pytest.raises(Killed):
        segment_stream(Live(), segmenter, four(output), options, progress=progress)
    assert not (output / "bag").exists()
    for _ in range(2):
        with pytest.raises(ConfigError, match="no past"):
            segment_stream(Live(), segmenter, four(output), options)
        assert_complete(output, list(range(4)), segmenter)


def test_a_live_source_that_gives_nothing_can_be_stopped(segmenter: Segmenter, tmp_path: Path) -> None:
    class Lost(Live):
        def _frames(self, start: int) -> Iterator[Frame]:
            yield from (frame for frame in super()._frames(0) if frame.index < 3)
            stop.set()  # someone has seen that nothing comes
            while not self._closed:
                time.sleep(0.01)

    stop = threading.Event()
    output = tmp_path / "out"
    summary = segment_stream(Lost(), segmenter, four(output), StreamOptions(output=output, policy="every"), stop=stop)
    assert summary.interrupted
    assert_complete(output, list(range(summary.done)), segmenter)


def test_another_source_or_other_outputs_are_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name in ("a.mkv", "b.mkv"):
        write_video(tmp_path / name, [picture(i) for i in range(3)])

    def run(name: str, sinks: dict[str, Sink]) -> StreamSummary:
        return segment_stream(open_source(str(tmp_path / name)), segmenter, sinks, StreamOptions(output=output))

    run("a.mkv", four(output))
    with pytest.raises(ConfigError, match=r"a\.mkv there, .*b\.mkv wanted"):
        run("b.mkv", four(output))
    with pytest.raises(ConfigError, match=r"outputs bag files \(masks\.png\) lines video there, lines wanted"):
        run("a.mkv", {"lines": LinesSink(output / "frames.jsonl")})
    with pytest.raises(
        ConfigError, match=r"files \(masks\.png\) lines video there, files \(masks\.png overlay\.jpg\) wanted"
    ):
        run("a.mkv", {"files": FilesSink(output, Products(overlay=True))})
    os.utime(tmp_path / "a.mkv", ns=(1, 1))
    with pytest.raises(ConfigError, match="content"):
        run("a.mkv", four(output))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "ddsm-manifest.jsonl").touch()
    with pytest.raises(ConfigError, match="masks of images"):
        options = StreamOptions(output=tmp_path / "images")
        segment_stream(open_source(str(tmp_path / "a.mkv")), segmenter, {}, options)


def test_a_source_that_tears_keeps_what_came_before(segmenter: Segmenter, tmp_path: Path) -> None:
    class Torn(Live):
        live = False

        def _frames(self, start: int) -> Iterator[Frame]:
            yield from (frame for frame in super()._frames(0) if start <= frame.index < 4)
            raise InputError("torn")

    output = tmp_path / "out"
    with pytest.raises(InputError, match="torn"):
        segment_stream(Torn(), segmenter, four(output), StreamOptions(output=output))
    assert [line["index"] for line in lines(output)] == [0, 1, 2, 3]
    journal = json.loads((output / "ddsm-stream.json").read_text())
    assert (journal["next"], journal["ended"]) == (4, False)


def test_frames_of_other_sizes_and_times_that_stand_still(segmenter: Segmenter, tmp_path: Path) -> None:
    """A source may change its size, and clocks may jump: the video goes on, at the first size and its own rate."""
    sizes = [(64, 96), (64, 96), (48, 60), (65, 97)]

    class Odd(Live):
        live = False

        def _frames(self, start: int) -> Iterator[Frame]:
            for index, size in enumerate(sizes):
                yield Frame(index=index, stamp=5, name="", image=picture(index, size))

    output = tmp_path / "out"
    segment_stream(Odd(), segmenter, four(output), StreamOptions(output=output))
    shown = pictures_in(output / "overlay.mp4")
    assert [image.shape for _, image in shown] == [(64, 96, 3)] * 4
    assert [time for time, _ in shown] == pytest.approx([0, 1 / 30, 2 / 30, 3 / 30], abs=1e-4)
    assert [mask.shape for *_, mask in masks_in(output / "bag")] == sizes
    assert cv2.imread(str(output / "masks" / "00000002.png"), cv2.IMREAD_UNCHANGED).shape == (48, 60)


def test_no_output_takes_its_sources_place(segmenter: Segmenter, tmp_path: Path) -> None:
    write_bag(tmp_path / "bag", [(0, picture(0))])
    write_video(tmp_path / "overlay.mp4", [picture(0)])
    (tmp_path / "masks").mkdir()
    cv2.imwrite(str(tmp_path / "masks" / "00000000.png"), picture(0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("bag", "overlay.mp4", "masks"):
        for overwrite in (False, True):
            options = StreamOptions(output=tmp_path, overwrite=overwrite)
            with pytest.raises(ConfigError, match="take another output folder"):
                segment_stream(open_source(str(tmp_path / name)), segmenter, four(tmp_path), options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_kill_before_anything_was_safe(segmenter: Segmenter, tmp_path: Path) -> None:
    """The masks that it left are no input of the same command, and no output of another source."""
    images, output = tmp_path / "images", tmp_path / "images" / "out"
    images.mkdir()
    for index in range(6):
        cv2.imwrite(str(images / f"{index}.png"), picture(index))
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(2)])

    def killed(summary: StreamSummary) -> None:
        if summary.done == 4:
            raise Killed

    def run(source: Path, **options: Any) -> StreamSummary:
        return segment_stream(
            open_source(str(source)), segmenter, four(output), StreamOptions(output=output), **options
        )

    with pytest.raises(Killed):
        run(images, progress=killed)
    assert len(list((output / "masks").iterdir())) == 4
    assert open_source(str(images)).count == 6
    assert run(tmp_path / "drive").done == 2
    assert_complete(output, [0, 1], segmenter)


def test_a_folder_whose_images_are_others_is_not_gone_on_with(segmenter: Segmenter, tmp_path: Path) -> None:
    images, output = tmp_path / "images", tmp_path / "out"
    images.mkdir()

    def run(first: int) -> StreamSummary:
        for path in images.iterdir():
            path.unlink()
        for index in range(3):
            cv2.imwrite(str(images / f"{first + index}.png"), picture(first + index))
        return segment_stream(open_source(str(images)), segmenter, four(output), StreamOptions(output=output))

    assert run(0).done == 3
    with pytest.raises(ConfigError, match="was made otherwise"):
        run(5)


def test_a_video_that_was_cut_off_is_told(segmenter: Segmenter, tmp_path: Path) -> None:
    """Its header, which mp4 may have in front, tells of more frames than there are."""
    import av

    whole = tmp_path / "whole.mp4"
    write_video(whole, [picture(i) for i in range(30)])
    with av.open(str(whole)) as source, av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as to:
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                to.mux(packet)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: len(data) * 2 // 3])
    output = tmp_path / "out"
    summary = segment_stream(
        open_source(str(tmp_path / "a.mp4")), segmenter, four(output), StreamOptions(output=output)
    )
    assert 10 < summary.done < 30
    assert summary.damaged == len(summary.failures) >= 1
    assert any("its header tells of 30" in error for _, error in summary.failures)


class Full:
    """A sink on a disk without room: closing, which writes the rest, fails as well."""

    outputs: tuple[str, ...] = ()
    closed = False

    def encode(self, frame: Frame, result: Any) -> None: ...

    def write(self, frame: Frame, encoded: None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def commit(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_and_closes_every_sink(segmenter: Segmenter, tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(3)])
    sinks: dict[str, Any] = {"first": Full(), "second": Full()}
    with pytest.raises(InputError, match=r"can't be written \(No space left on device\); what is safe stays"):
        options = StreamOptions(output=tmp_path / "out")
        segment_stream(open_source(str(tmp_path / "drive")), segmenter, sinks, options)
    assert all(sink.closed for sink in sinks.values())
