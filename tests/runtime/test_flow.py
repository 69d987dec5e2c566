"""Frames pass in order, few at a time; what is late is dropped and counted where that is the policy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ddsm_deploy.errors import BackendError, ConfigError, InputError
from ddsm_deploy.runtime.flow import Flow, IterableSource, Submissions
from ddsm_deploy.streams.frames import BaseSource, Frame

IMAGE = np.zeros((2, 2, 3), np.uint8)


class Counted(BaseSource):
    """So many frames; counts those that were read, and whether it was closed."""

    def __init__(self, count: int, *, damaged: tuple[int, ...] = (), fails_at: int = -1) -> None:
        super().__init__()
        self.total, self.broken, self.fails_at = count, damaged, fails_at
        self.read = 0
        self.released = False

    def _frames(self, start: int) -> Iterator[Frame]:
        for index in range(start, self.total):
            if index == self.fails_at:
                raise InputError("torn")
            self.read = index + 1
            image = None if index in self.broken else IMAGE
            yield Frame(
                index=index, stamp=index, name=str(index), image=image, error="" if image is not None else "bad"
            )

    def _release(self) -> None:
        assert not self.released
        self.released = True


def test_results_come_in_order_whoever_is_first() -> None:
    gates = [threading.Event() for _ in range(6)]

    def work(frame: Frame) -> int:
        assert gates[frame.index].wait(30)
        if frame.index:
            gates[frame.index - 1].set()  # so the later one is always done first
        return frame.index * 10

    gates[2].set()
    with Flow(Counted(3), work, workers=3) as flow:
        assert [(frame.index, result) for frame, result in flow] == [(0, 0), (1, 10), (2, 20)]


def test_no_more_than_so_many_are_in_hand() -> None:
    source = Counted(50)
    with Flow(source, lambda frame: frame.index, workers=1, ahead=4) as flow:
        for frame, result in flow:
            assert frame.index == result
            # those taken, four in hand, and one that the reader holds
            assert source.read <= frame.index + 1 + 4 + 1
    assert source.read == 50 and source.released and flow.dropped == 0


def test_latest_drops_what_waits_and_counts_it() -> None:
    """The worker is held at frame 0 until the source has given all: of the others the last alone is left."""
    read_all = threading.Event()

    class Ending(Counted):
        def _frames(self, start: int) -> Iterator[Frame]:
            yield from super()._frames(start)
            read_all.set()

    source = Ending(10)

    def work(frame: Frame) -> int:
        assert read_all.wait(30)
        return frame.index

    with Flow(source, work, policy="latest") as flow:
        assert [result for _, result in flow] == [0, 9]
    assert flow.dropped == 8


def test_damaged_frames_pass_by() -> None:
    told: list[Frame] = []
    with Flow(Counted(5, damaged=(0, 3)), lambda frame: frame.index, on_damage=told.append) as flow:
        assert [result for _, result in flow] == [1, 2, 4]
    assert flow.damaged == 2 and [frame.index for frame in told] == [0, 3]


def test_an_error_of_the_source_comes_after_what_was_read() -> None:
    seen = []
    with pytest.raises(InputError, match="torn"):
        for frame, _ in Flow(Counted(5, fails_at=3), lambda frame: frame.index):
            seen.append(frame.index)
    assert seen == [0, 1, 2]


def test_an_error_of_the_work_comes_in_its_place() -> None:
    def work(frame: Frame) -> int:
        if frame.index == 2:
            raise ValueError("two")
        return frame.index

    seen = []
    source = Counted(100)
    with pytest.raises(ValueError, match="two"):
        for frame, _ in Flow(source, work, workers=2):
            seen.append(frame.index)
    assert seen == [0, 1] and source.released


def test_leaving_the_loop_closes_it() -> None:
    source = Counted(1000)
    for frame, _ in Flow(source, lambda frame: frame.index):
        if frame.index == 3:
            break
    assert source.released and source.read < 20
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("ddsm-read", "ddsm-work"))]


def test_closing_from_another_thread_ends_the_loop() -> None:
    begun, gate = threading.Event(), threading.Event()

    def work(frame: Frame) -> int:
        begun.set()
        assert gate.wait(30)
        return frame.index

    flow = Flow(Counted(100), work)
    seen: list[int] = []
    loop = threading.Thread(target=lambda: seen.extend(frame.index for frame, _ in flow))
    loop.start()
    assert begun.wait(30)
    closing = threading.Thread(target=flow.close)
    closing.start()
    while not flow._closed:
        pass
    gate.set()
    for thread in (closing, loop):
        thread.join(30)
        assert not thread.is_alive()
    assert seen in ([], [0])  # the one in hand may come out, those behind it never began


def test_stop_lets_what_is_in_hand_come_out() -> None:
    seen = []
    with Flow(Counted(1000), lambda frame: frame.index, workers=2, ahead=4) as flow:
        for frame, _ in flow:
            seen.append(frame.index)
            if frame.index == 5:
                flow.stop()
    assert seen == list(range(len(seen))) and 6 <= len(seen) <= 11


def test_start() -> None:
    with Flow(Counted(5), lambda frame: frame.index, start=3) as flow:
        assert [result for _, result in flow] == [3, 4]


@pytest.mark.parametrize("wrong", [{"policy": "newest"}, {"workers": 0}, {"ahead": 0}])
def test_wrong_options(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        Flow(Counted(1), lambda frame: frame, **wrong)


def test_anything_that_gives_images_is_a_source() -> None:
    assert [f.index for f in IterableSource([IMAGE, IMAGE]).frames(1)] == [1]
    own = Frame(index=7, stamp=5, name="seven", image=IMAGE)
    assert list(IterableSource(iter([own])).frames()) == [own]


def test_submissions_are_bounded() -> None:
    gate, running = threading.Event(), []

    def work(number: int) -> int:
        running.append(number)
        assert gate.wait(30)
        return number

    calls = Submissions(work, in_flight=2, workers=2)
    first = [calls.submit(0), calls.submit(1)]
    done = threading.Event()
    later: list = []
    waiting = threading.Thread(target=lambda: (later.append(calls.submit(2)), done.set()))
    waiting.start()
    assert not done.wait(0.2) and 2 not in running  # it waits for one of the first two
    gate.set()
    assert done.wait(30)
    waiting.join()
    assert [future.result(30) for future in (*first, *later)] == [0, 1, 2]
    calls.close()


def test_closed_submissions_take_no_more() -> None:
    gate = threading.Event()
    calls = Submissions(lambda: gate.wait(30), in_flight=1, workers=1)
    first = calls.submit()
    refused: list[str] = []

    def late() -> None:
        with pytest.raises(BackendError) as error:
            calls.submit()
        refused.append(str(error.value))

    waiting = threading.Thread(target=late)  # until the first is done, which is after closing has begun
    waiting.start()
    closing = threading.Thread(target=calls.close)
    closing.start()
    while not calls._pool._shutdown:  # until closing has begun, which nothing else tells
        time.sleep(0.01)
    gate.set()
    waiting.join(30)
    closing.join(30)
    assert first.result(0) and refused == ["this segmenter is closed"]


def test_nothing_is_read_before_it_is_iterated_over() -> None:
    source = Counted(5)
    before = set(threading.enumerate())
    flow = Flow(source, lambda frame: frame.index)
    assert set(threading.enumerate()) == before  # a flow that is forgotten now leaves no thread
    assert [index for _, index in flow] == [0, 1, 2, 3, 4] and source.released
    unread = Flow(source := Counted(5), lambda frame: frame.index)
    unread.close()
    assert source.read == 0 and source.released and list(unread) == []
