"""Frames at a camera's pace: the schedule, the frames that wait, and the record of when each one's mask was there.

Three threads share a run. The camera's sleeps until a frame is due and hands it over; it never waits for the segmenter.
The worker's takes the frame that waits and segments it. The caller's reads the process's memory a few times a second.
All that they write down goes into arrays that are filled before the first frame, so that the record itself makes memory
neither grow nor pause. Python's garbage collector is left as it is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.evaluate.machine import resident_mb
from ddsm_deploy.evaluate.worker import WARM_UP_SECONDS
from ddsm_deploy.images import Image, Labels
from ddsm_deploy.runtime.mailbox import Mailbox
from ddsm_deploy.runtime.segmentation import Segmentation

MEMORY_SECONDS = 0.25
"""Time between two looks at the process's memory."""

_LEAD_SECONDS = 0.1
"""From the start of the threads to the first frame."""

_LONGEST_NAP = 0.1
"""The camera looks so often, at the least, whether the run has ended."""

Floats = npt.NDArray[np.float64]

Segment = Callable[[Image], Segmentation]
"""What is measured: image (uint8 H×W×3, BGR) -> its segmentation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """When frames come, and which of them wait.

    Attributes:
        rate: frames a second; frame i is due i / rate seconds after the first one.
        frames: how many come.
        policy: ``latest``: one frame waits, and a newer one takes its place; ``every``: all wait, in a queue.
        patience: seconds after the last frame's period; what still waits then is dropped.
    """

    rate: float
    frames: int
    policy: str = "latest"
    patience: float = 60.0

    @property
    def capacity(self) -> int | None:
        """How many frames may wait; None for any number."""
        return 1 if self.policy == "latest" else None

    @property
    def longest(self) -> float:
        """Seconds from the first frame to the end of all patience."""
        return self.frames / self.rate + self.patience


class Record:
    """When what happened to each frame, and whether its mask was the right one.

    Times are seconds of `time.perf_counter`, one a frame, NaN where it did not happen.

    Attributes:
        schedule: as given.
        due: when the frame was to arrive; until the run starts, seconds since the first one.
        arrived: when the camera's thread handed it over, noted once that is done; latencies count from `due`.
        taken: when the worker began with it.
        done: when its mask was there.
        reordered: masks that came out after the mask of a later frame.
        mixed_up: masks that were not, to the pixel, those of their own frame.
        interrupted: by Ctrl-C; there are only the frames up to the last one that was begun.

    Args:
        schedule: how many frames, and how fast.
        masks: the right mask of each distinct image; frame i shows image i modulo their number.
    """

    def __init__(self, schedule: Schedule, masks: Sequence[Labels]) -> None:
        self.schedule = schedule
        self.due = np.arange(schedule.frames) / schedule.rate
        self.arrived, self.taken, self.done = (np.full(schedule.frames, np.nan) for _ in range(3))
        self.reordered = self.mixed_up = 0
        self.interrupted = False
        self._masks = masks
        self._newest = -1
        self._lock = threading.Lock()
        self._memory = np.full((math.ceil((schedule.longest + 10) / MEMORY_SECONDS), 2), np.nan)
        self._looks = 0

    def finish(self, index: int, mask: Labels) -> None:
        """Notes that a frame's mask is there. May be called from any thread, in any order.

        The mask is compared after the time is taken: some tens of µs, which only the next frame can wait for.
        """
        self.done[index] = time.perf_counter()
        wrong = not _same(mask, self._masks[index % len(self._masks)])
        with self._lock:
            self.reordered += index < self._newest
            self._newest = max(self._newest, index)
            self.mixed_up += wrong

    def cut_short(self) -> None:
        """Leaves out what no longer came to its turn when the run was interrupted.

        Raises:
            KeyboardInterrupt: nothing is left.
        """
        begun = np.flatnonzero(np.isfinite(self.taken))
        if not len(begun):
            raise KeyboardInterrupt
        self.interrupted = True
        self.due, self.arrived, self.taken, self.done = (
            times[: begun[-1] + 1] for times in (self.due, self.arrived, self.taken, self.done)
        )

    def look_at_memory(self) -> None:
        """Notes what memory the process holds now."""
        if self._looks < len(self._memory):
            self._memory[self._looks] = time.perf_counter(), resident_mb() or math.nan
            self._looks += 1

    @property
    def delivered(self) -> npt.NDArray[np.bool_]:
        """Which frames got a mask; the others were dropped."""
        finished: npt.NDArray[np.bool_] = np.isfinite(self.done)
        return finished

    @property
    def latencies_ms(self) -> Floats:
        """From the moment a frame was due to its mask, milliseconds; NaN for dropped ones."""
        return (self.done - self.due) * 1e3

    @property
    def memory(self) -> Floats:
        """Float64 K×2: seconds since the first frame was due, resident memory in 10⁶ bytes (NaN: not told here)."""
        looks: Floats = self._memory[: self._looks] - np.array([self.due[0], 0.0])
        return looks


def pace(
    due: Floats,
    arrive: Callable[[int], None],
    stop: threading.Event,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Calls `arrive(i)` at `due[i]`: an absolute schedule, on which a late call does not delay the ones after it.

    Sleeping alone is exact enough (about 0.1 ms late on Linux); a loop that waits for the last moment would take the
    processor, and Python's lock, from the segmenter.

    Args:
        due: seconds of `clock`, ascending.
        arrive: must not wait for anything.
        stop: once set, no further frame arrives.
        clock: tells the time.
        sleep: waits so many seconds, or somewhat longer.
    """
    for index, moment in enumerate(due.tolist()):
        while not stop.is_set() and (left := moment - clock()) > 0:
            sleep(min(left, _LONGEST_NAP))
        if stop.is_set():
            return
        arrive(index)


def run_paced(segment: Segment, images: Sequence[Image], record: Record, *, warm_up: int = 0) -> None:
    """Lets frames come on schedule and records what becomes of them.

    After the last frame those that still wait are segmented too, as long as the schedule's patience lasts. Ctrl-C ends
    the run, and the record is of what came before.

    Args:
        segment: what is measured; one thread calls it, one image at a time.
        images: decoded, shown in turn.
        record: new; it has the schedule, and is filled while the run goes on.
        warm_up: runs before the first frame, in the thread that will do the work: runtimes and the memory allocator
            keep things for each thread.

    Raises:
        DdsmError: whatever `segment` raised.
        KeyboardInterrupt: Ctrl-C before the first frame was taken, or once more before the one in hand was done.
    """
    schedule = record.schedule
    inbox: Mailbox[int] = Mailbox(schedule.capacity)
    stop = threading.Event()

    def arrive(index: int) -> None:
        now = time.perf_counter()
        inbox.put(index)
        record.arrived[index] = now

    with (
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ddsm-camera") as camera_thread,
        concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ddsm-worker") as worker_thread,
    ):
        worker_thread.submit(_warm_up, segment, images, warm_up).result()
        record.look_at_memory()
        record.due += time.perf_counter() + _LEAD_SECONDS
        limit = record.due[0] + schedule.longest
        interrupted = False
        started: list[concurrent.futures.Future[None]] = []
        try:
            working = worker_thread.submit(_work, inbox, segment, images, record)
            started.append(working)
            camera = camera_thread.submit(pace, record.due, arrive, stop)
            started.append(camera)
            camera.add_done_callback(lambda _: inbox.close())
            while not concurrent.futures.wait((working,), timeout=MEMORY_SECONDS).done:
                record.look_at_memory()
                if time.perf_counter() > limit:
                    inbox.close(discard=True)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            stop.set()
            inbox.close(discard=True)
        for future in started:
            future.result()
    record.look_at_memory()
    if interrupted:
        record.cut_short()


def _warm_up(segment: Segment, images: Sequence[Image], runs: int) -> None:
    start = time.perf_counter()
    for index in range(runs):
        if time.perf_counter() - start > WARM_UP_SECONDS:
            return
        segment(images[index % len(images)])


def _work(inbox: Mailbox[int], segment: Segment, images: Sequence[Image], record: Record) -> None:
    """The pipeline that is measured. One that has several frames under way would be another loop like this one."""
    while (index := inbox.take()) is not None:
        record.taken[index] = time.perf_counter()
        record.finish(index, segment(images[index % len(images)]).mask)


def _same(mask: Labels, other: Labels) -> bool:
    return mask.shape == other.shape and cv2.norm(mask, other, cv2.NORM_INF) == 0  # unlike numpy it makes no array
