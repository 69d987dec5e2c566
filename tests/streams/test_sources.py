"""Every source gives its frames once, in order, with their stamps; damage is told and passed over."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import pytest
from recordings import picture, stamp_of, write_bag, write_video

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.streams.frames import Frame, Source
from ddsm_deploy.streams.sources import is_stream, open_source


@pytest.fixture(autouse=True)
def _packages(need) -> None:
    for module in ("rosbags", "av"):
        need(module)


def read(source: Source, start: int = 0) -> list[Frame]:
    frames = list(source.frames(start))
    source.close()
    source.close()
    return frames


def same(frame: Frame, image: np.ndarray) -> bool:
    return frame.image is not None and np.array_equal(frame.image, image)


@pytest.mark.parametrize("storage", ["mcap", "sqlite3", "ros1"])
@pytest.mark.parametrize("compressed", ["", "png"])
def test_recordings(storage: str, compressed: str, tmp_path: Path) -> None:
    path = tmp_path / ("drive.bag" if storage == "ros1" else "drive")
    write_bag(path, [(i, picture(i)) for i in range(5)], storage=storage, compressed=compressed)
    source = open_source(str(path))
    assert (source.live, source.count) == (False, 5)
    assert source.rate == pytest.approx(30, abs=0.1)
    frames = read(source, 2)
    assert [frame.index for frame in frames] == [2, 3, 4]
    for frame in frames:
        assert same(frame, picture(frame.index))
        assert frame.stamp == stamp_of(frame.index) and frame.received == frame.stamp + 5_000_000
        assert frame.frame_id == "camera" and not frame.error


def test_a_recordings_storage_file_stands_for_it(tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(0, picture(0))])
    (file,) = (tmp_path / "drive").glob("*.mcap")
    assert len(read(open_source(str(file)))) == 1
    alone = file.rename(tmp_path / "alone.mcap")
    assert len(read(open_source(str(alone)))) == 1


def test_a_damaged_message_is_told_and_passed_over(tmp_path: Path) -> None:
    good = cv2.imencode(".jpeg", picture(1))[1].tobytes()
    write_bag(tmp_path / "drive", [(0, b"no jpeg"), (1, good), (2, b""), (3, good[:-40])], compressed="jpeg")
    frames = read(open_source(str(tmp_path / "drive")))
    assert [frame.image is None for frame in frames] == [True, False, True, True]
    assert "not an image" in frames[0].error and "empty" in frames[2].error and "truncated" in frames[3].error
    write_bag(tmp_path / "short", [(0, b"12345"), (1, picture(1))])
    frames = read(open_source(str(tmp_path / "short")))
    assert "5 bytes" in frames[0].error and same(frames[1], picture(1))


def test_topics_are_told(tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(0, picture(0))], topic="/left/image_raw")
    with pytest.raises(ConfigError, match="no image topic /right; there are: /left/image_raw"):
        open_source(str(tmp_path / "drive"), topic="/right")
    with pytest.raises(ConfigError, match="a topic is for recordings"):
        open_source(str(tmp_path), topic="/right")


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "a.mcap").write_bytes(b"junk" * 100)
    (tmp_path / "a.mp4").write_bytes(b"junk" * 100)
    for name in ("a.mcap", "b.mcap", "a.mp4", "b.mp4"):
        with pytest.raises(InputError, match=name):
            open_source(str(tmp_path / name))


def test_a_recording_cut_off_gives_what_it_holds(tmp_path: Path) -> None:
    """As a robot leaves it that lost its power: MCAP without its end can't be read, and says so in one line."""
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(5)])
    (file,) = (tmp_path / "drive").glob("*.mcap")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match="drive"):
        read(open_source(str(tmp_path / "drive")))


def test_videos_keep_their_own_times(tmp_path: Path) -> None:
    times = [0, 40, 50, 200, 233]
    write_video(tmp_path / "a.mkv", [picture(i) for i in range(5)], times=times)
    frames = read(open_source(str(tmp_path / "a.mkv")))
    assert [frame.stamp // 1_000_000 for frame in frames] == times
    assert all(same(frame, picture(frame.index)) for frame in frames)
    later = read(open_source(str(tmp_path / "a.mkv")), 3)
    assert [(frame.index, frame.stamp) for frame in later] == [(f.index, f.stamp) for f in frames[3:]]


def test_a_video_damaged_inside_goes_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    write_video(path, [picture(i) for i in range(40)])
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 200] = bytes(200)
    path.write_bytes(bytes(data))
    frames = read(open_source(str(path)))
    whole = [frame for frame in frames if frame.image is not None]
    assert len(whole) >= 30 and same(whole[0], picture(0)) and same(whole[-1], picture(39))
    assert [frame.index for frame in frames] == list(range(len(frames)))


def test_folders_and_globs(tmp_path: Path) -> None:
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{index}.png"), picture(index))
    (tmp_path / "2.png").write_bytes(b"junk")
    for text in (str(tmp_path), str(tmp_path / "*.png")):
        frames = read(open_source(text))
        assert [frame.name for frame in frames] == ["0", "1", "2", "3"]
        assert frames[2].image is None and "2.png" in frames[2].error
        assert same(frames[3], picture(3)) and frames[3].stamp == 100_000_000  # the fourth at 30 a second
    with pytest.raises(InputError, match="no image there"):
        open_source(str(tmp_path / "*.jpg"))


def test_what_a_folder_of_images_leaves_out(tmp_path: Path) -> None:
    for path in ("b/1.png", "a.png", ".hidden/2.png", "._a.png", "out/masks/0.png", "out2/masks/0.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / path), picture(0))
    (tmp_path / "out" / "ddsm-stream.json").touch()
    (tmp_path / "out2" / "ddsm-manifest.jsonl").touch()
    assert [frame.name for frame in read(open_source(str(tmp_path)))] == ["a", "1"]
    (tmp_path / "ddsm-stream.json").touch()  # asked for by its name, it is read
    assert open_source(f"{tmp_path}/").count == 2


def test_an_exclamation_mark_in_a_glob(tmp_path: Path) -> None:
    for name in ("a.png", "_b.png"):
        assert cv2.imwrite(str(tmp_path / name), picture(0))
    pattern = f"{tmp_path}/[!_]*.png"
    assert not is_stream(pattern)
    assert [frame.name for frame in read(open_source(pattern))] == ["a"]
    assert is_stream("v4l2src ! appsink")


def test_words_that_stand_for_streams(tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(0, picture(0))])
    streams = ["0", "rtsp://camera/1", "http://x/y", "videotestsrc ! appsink", "a.mp4", "A.MKV", "a.bag", "a.mcap"]
    assert all(map(is_stream, [*streams, str(tmp_path / "drive")]))
    assert not any(map(is_stream, ["frames", "a.png", "*.jpg", str(tmp_path)]))


def test_closing_in_the_middle_ends_the_frames(tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, picture(i)) for i in range(5)])
    source = open_source(str(tmp_path / "drive"))
    frames = source.frames()
    next(frames)
    source.close()
    assert list(frames) == [] and list(source.frames()) == []


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(InputError, match="camera 97"):
        open_source("97")


class Camera(http.server.BaseHTTPRequestHandler):
    """A network camera (MJPEG over HTTP). Its pictures are made by a function of their number; after `length` of them
    it hangs up, and notes in `served` how many they were."""

    def __init__(self, encode: Callable[[int], bytes], length: int, served: list[int], *args: object) -> None:
        self.encode, self.length, self.served = encode, length, served
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for index in range(self.length):
            data = self.encode(index)
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            try:
                self.wfile.write(head + data + b"\r\n")
            except OSError:  # the reader has gone
                return
            time.sleep(0.01)
        self.served.append(self.length)

    def log_message(self, *args: object) -> None:
        pass


class Files(http.server.SimpleHTTPRequestHandler):
    """A folder."""

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server of it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def camera() -> Iterator[tuple[str, list[int]]]:
    served: list[int] = []

    def encode(index: int) -> bytes:
        return cv2.imencode(".jpg", np.full((48, 64, 3), 10 * index, np.uint8))[1].tobytes()

    with serving(functools.partial(Camera, encode, 20, served)) as address:
        yield f"{address}/stream.mjpg", served


def test_a_network_stream_that_is_lost_comes_back(camera: tuple[str, list[int]]) -> None:
    url, served = camera
    said: list[str] = []
    source = open_source(url, report=said.append)
    assert source.live
    before, indices = time.time_ns(), []
    for frame in source.frames():
        assert frame.image is not None and frame.image.shape == (48, 64, 3)
        assert before <= frame.stamp <= time.time_ns()
        indices.append(frame.index)
        if len(served) >= 2 and len(indices) > 45:
            break
    source.close()
    assert indices == list(range(len(indices)))
    assert any("lost" in line for line in said) and any("back" in line for line in said)


def test_frames_that_waited_for_a_model_are_left_out() -> None:
    """Else they would be stamped as if they had come when they were read."""
    start = time.monotonic()

    def clock(_: int) -> bytes:
        grey = min(255, int(100 * (time.monotonic() - start)))
        return cv2.imencode(".jpg", np.full((48, 64, 3), grey, np.uint8))[1].tobytes()

    with serving(functools.partial(Camera, clock, 1000, [])) as address:
        source = open_source(f"{address}/stream.mjpg")
        time.sleep(1.2)
        asked = time.monotonic()
        frame = next(source.frames())
        source.close()
    assert frame.image is not None
    assert frame.image.mean() > min(225, 100 * (asked - start) - 30)  # taken after it was asked for, or nearly


def test_a_damaged_picture_of_a_live_stream_is_no_lost_connection() -> None:

    def sometimes(index: int) -> bytes:
        data = cv2.imencode(".jpg", picture(index))[1].tobytes()
        return data if index % 10 != 9 else b"\xff\xd8" + bytes(300) + b"\xff\xd9"

    said: list[str] = []
    frames: list[Frame] = []
    with serving(functools.partial(Camera, sometimes, 1000, [])) as address:
        source = open_source(f"{address}/stream.mjpg", report=said.append)
        for frame in source.frames():
            frames.append(frame)
            if len(frames) == 45:
                break
        source.close()
    assert not said
    assert [frame.index for frame in frames] == list(range(45))
    damaged = [frame for frame in frames if frame.image is None]
    assert 3 <= len(damaged) <= 6 and all(frame.error for frame in damaged)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_connection_lost_within_a_video_is_not_its_end(name: str, tmp_path: Path) -> None:
    write_video(tmp_path / name, [picture(i) for i in range(40)])

    class Cut(Files):
        def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:
            data = source.read()
            outputfile.write(data[: len(data) * 2 // 3])

    with serving(functools.partial(Cut, directory=str(tmp_path))) as address, pytest.raises(InputError):
        read(open_source(f"{address}/{name}"))


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_video_file_at_an_address_is_read_once(name: str, tmp_path: Path) -> None:
    write_video(tmp_path / name, [picture(i) for i in range(5)])
    handler = functools.partial(Files, directory=str(tmp_path))
    with serving(handler) as address:
        source = open_source(f"{address}/{name}")
        assert not source.live
        frames = read(source)
    want = read(open_source(str(tmp_path / name)))
    assert [(frame.index, frame.stamp) for frame in frames] == [(frame.index, frame.stamp) for frame in want]
    assert all(a.image is not None and same(b, a.image) for a, b in zip(frames, want, strict=True))


def test_frames_that_are_too_large(camera: tuple[str, list[int]], tmp_path: Path) -> None:
    """Of a recording and a network stream as of a video; a camera has no test, for there is none here."""
    write_bag(tmp_path / "raw", [(0, picture(0))])
    write_bag(tmp_path / "png", [(0, picture(0))], compressed="png")
    write_video(tmp_path / "a.mkv", [picture(0)])
    for source in (str(tmp_path / "raw"), str(tmp_path / "png"), str(tmp_path / "a.mkv"), camera[0]):
        opened = open_source(source, max_pixels=100)
        frame = next(opened.frames())
        opened.close()
        assert frame.image is None and "pixels" in frame.error and "100" in frame.error, source


def test_an_address_that_never_worked() -> None:
    with pytest.raises(InputError, match="can't be opened"):
        open_source("http://127.0.0.1:9/stream")
