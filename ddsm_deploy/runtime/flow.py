"""`Flow`: frames of a source through a function on other threads, results in order, memory bounded.

A thread reads the source, `workers` threads run the function, and whoever iterates takes the results, in the order of
the frames. So decoding, inference and what is done with a mask overlap, and no queue grows: a frame counts as *in hand*
from its reading until its result is taken, and no more than a fixed number are.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from types import TracebackType
from typing import Generic, Self, TypeVar

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.images import Image
from ddsm_deploy.streams.frames import BaseSource, Frame, Source

T = TypeVar("T")

POLICIES = ("every", "latest")
"""``every``: the source waits, nothing is left out. ``latest``: the source never waits; where a newer frame comes, the
one that waits is dropped and counted."""

_END = None
_PATIENCE = 15.0
"""Seconds that `close` waits for a source to let go: longer than a network read may take."""


class Flow(Generic[T]):
    """Iterating gives pairs of a frame and what `work` made of it. Damaged frames pass it by: see `damaged`.

    Best in a ``with`` block; leaving a ``for`` loop early closes it as well. Reading starts with either.

    Attributes:
        dropped: frames that were left out since a newer one came.
        damaged: frames that came without an image.

    Args:
        source: where frames come from; closed with the flow.
        work: called with each frame, on several threads at once where `workers` is above 1.
        policy: of `POLICIES`; None is ``latest`` for a live source and ``every`` for others.
        workers: threads that run `work`.
        ahead: frames in hand with ``every``; None is three a worker. With ``latest`` it is one a worker, and one waits.
        start: index of the first frame.
        on_damage: called with each damaged frame, on the reading thread.

    Raises:
        ConfigError: a policy that does not exist, or a number below 1.
    """

    def __init__(
        self,
        source: Source,
        work: Callable[[Frame], T],
        *,
        policy: str | None = None,
        workers: int = 1,
        ahead: int | None = None,
        start: int = 0,
        on_damage: Callable[[Frame], None] | None = None,
    ) -> None:
        policy = policy or ("latest" if source.live else "every")
        if policy not in POLICIES:
            raise ConfigError(f"policy is {policy!r}; expected {' or '.join(POLICIES)}")
        ahead = 3 * workers if ahead is None else ahead
        if min(workers, ahead) < 1:
            raise ConfigError(f"workers is {workers} and ahead {ahead}; expected at least 1")
        self.dropped = 0
        self.damaged = 0
        self._source, self._work, self._on_damage = source, work, on_damage
        self._latest = policy == "latest"
        self._free = workers if self._latest else ahead
        self._waiting: Frame | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._results: queue.SimpleQueue[tuple[Frame, concurrent.futures.Future[T]] | None] = queue.SimpleQueue()
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="ddsm-work")
        # a daemon: a camera that hangs must not keep the program from ending
        self._reader = threading.Thread(target=self._read, args=(start,), name="ddsm-read", daemon=True)
        self._started = False

    def __iter__(self) -> Iterator[tuple[Frame, T]]:
        """See the class.

        Raises:
            DdsmError: what the source or `work` raised, in its place in the order.
        """
        self._start()
        try:
            while (item := self._results.get()) is not _END:
                frame, future = item
                try:
                    result = future.result()
                except concurrent.futures.CancelledError:  # another thread has closed it
                    return
                self._taken()
                yield frame, result
            if self._failure is not None:
                raise self._failure
        finally:
            self.close()

    def stop(self) -> None:
        """Begins no further frame; those in hand still come out."""
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()

    def close(self) -> None:
        """Stops, drops what is in hand, and closes the source; again does nothing."""
        self.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._source.close()
        if self._started and threading.current_thread() is not self._reader:
            self._reader.join(_PATIENCE)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._results.put(_END)  # whoever still waits is let go

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        """Not on making it: a flow that is dropped before anything closes it would leave its threads behind."""
        with self._changed:
            if not self._started and not self._closed:
                self._started = True
                self._reader.start()

    def _read(self, start: int) -> None:
        try:
            with contextlib.closing(_closable(self._source.frames(start))) as frames:
                for frame in frames:
                    if self._closed:
                        break
                    if frame.image is not None:
                        self._offer(frame)
                    else:
                        self.damaged += 1
                        if self._on_damage is not None:
                            self._on_damage(frame)
        except BaseException as exc:  # noqa: BLE001 - it is raised again where the results are taken
            self._failure = exc
        with self._changed:
            while self._waiting is not None and not self._closed:
                self._changed.wait()
        self._results.put(_END)

    def _offer(self, frame: Frame) -> None:
        with self._changed:
            if self._latest and not self._free:
                self.dropped += self._waiting is not None
                self._waiting = frame
                return
            while not self._free and not self._closed:
                self._changed.wait()
            if not self._closed:
                self._free -= 1
                self._begin(frame)

    def _taken(self) -> None:
        with self._changed:
            if self._waiting is not None and not self._closed:
                self._begin(self._waiting)
                self._waiting = None
            else:
                self._free += 1
            self._changed.notify_all()

    def _begin(self, frame: Frame) -> None:
        self._results.put((frame, self._pool.submit(self._work, frame)))


def _closable(frames: Iterator[Frame]) -> Generator[Frame, None, None]:
    """A generator, which ends `frames` with it: a source that is not read any more can give its file back."""
    yield from frames


class Submissions(Generic[T]):
    """Single calls of a function on threads of their own, with a bound on how many are in hand.

    Args:
        work: the function.
        in_flight: calls in hand at most.
        workers: threads.
    """

    def __init__(self, work: Callable[..., T], *, in_flight: int, workers: int) -> None:
        self._work = work
        self._slots = threading.BoundedSemaphore(in_flight)
        self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="ddsm-submit")

    def submit(self, *args: object) -> concurrent.futures.Future[T]:
        """Calls the function on a thread; waits first while too many are in hand.

        Raises:
            BackendError: closed, before or while it waited.
        """
        self._slots.acquire()
        try:
            future = self._pool.submit(self._work, *args)
        except BaseException as exc:
            self._slots.release()
            if isinstance(exc, RuntimeError):  # the pool's, which takes no more
                raise BackendError("this segmenter is closed") from exc
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def close(self) -> None:
        """Waits for what is in hand, and takes no more."""
        self._pool.shutdown(wait=True)


class IterableSource(BaseSource):
    """Images from anything that can be iterated over, as a source: a list, a generator, a camera's own loop.

    Args:
        images: uint8 H×W×3, BGR each, or `Frame` objects, which pass as they are.
        live: whether they come by themselves.
    """

    def __init__(self, images: Iterable[Image | Frame], *, live: bool = False) -> None:
        super().__init__()
        self.live = live
        self.name = type(images).__name__
        self.count = len(images) if isinstance(images, Sized) else None
        self._images = images

    def _frames(self, start: int) -> Iterator[Frame]:
        for index, image in enumerate(self._images):
            if index >= start:
                yield image if isinstance(image, Frame) else Frame(index=index, stamp=0, name=str(index), image=image)
