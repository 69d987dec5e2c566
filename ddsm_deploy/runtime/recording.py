"""`segment_stream`: a video, a recording or a camera to masks, videos, bags; a killed run goes on where it stopped.

Frames run through a `Flow`: one thread reads, `workers` threads infer and encode, the calling thread writes in order.
Every `COMMIT_SECONDS` the sinks make safe what they have, and the journal notes how far that is. What came after the
last note is made again by the run that goes on, and takes the place of what is there: nothing twice, nothing lost.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2

from ddsm_deploy.errors import ConfigError, DdsmError, InputError
from ddsm_deploy.listing import JOURNAL_NAME, MANIFEST_NAME, NOT_OURS
from ddsm_deploy.runtime.decisions import usable_cores
from ddsm_deploy.runtime.flow import Flow
from ddsm_deploy.runtime.journal import Journal, Progress
from ddsm_deploy.runtime.manifest import Identity
from ddsm_deploy.runtime.pipeline import calm_opencv, identity_of, make_folder
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sinks.base import Sink
from ddsm_deploy.streams.frames import Frame, Source

COMMIT_SECONDS = 5.0
"""Of work that a kill costs at most."""

LISTED = 1000
"""Damaged frames that a summary names; more are counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How `segment_stream` runs.

    Attributes:
        output: the folder for everything; made where missing.
        policy: ``every`` or ``latest``; None is ``latest`` for live sources and ``every`` for others.
        overwrite: make anew what is there.
        workers: frames worked on side by side; None is one a core, with ``latest`` one.
        max_frames: stop after so many; None goes on to the source's end.
    """

    output: Path
    policy: str | None = None
    overwrite: bool = False
    workers: int | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; expected at least 1")


@dataclasses.dataclass(kw_only=True)
class StreamSummary:
    """How a run went.

    Attributes:
        output: the folder written to.
        source: what was read.
        count: frames of the source, where it knows.
        done: frames segmented now.
        skipped: frames of which an earlier run had taken care.
        damaged: frames without an image, now.
        dropped: frames left out for newer ones, now.
        failures: of the damaged ones the first `LISTED`: index and reason.
        seconds: wall time over the frames, without opening source and model.
        interrupted: whether it was asked to stop before the end.
    """

    output: Path
    source: str
    count: int | None = None
    done: int = 0
    skipped: int = 0
    damaged: int = 0
    dropped: int = 0
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def fps(self) -> float:
        """Frames segmented a second."""
        return self.done / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {**dataclasses.asdict(self), "output": str(self.output), "fps": self.fps}


def segment_stream(
    source: Source,
    segmenter: Segmenter,
    sinks: Mapping[str, Sink],
    options: StreamOptions,
    *,
    progress: Callable[[StreamSummary], None] | None = None,
    stop: threading.Event | None = None,
) -> StreamSummary:
    """Segments a stream into `sinks`, or goes on with it where a killed run stopped.

    Args:
        source: closed at the end.
        segmenter: best from `open_for_batch`; for a live source from `Segmenter.open`.
        sinks: by name; closed at the end.
        options: how.
        progress: called in this thread at the start and after each frame, with the summary so far.
        stop: once set, no further frame is begun. A live source's files are finished then; those of others are when a
            later run has come to the end. A live source that ends by an error has its files finished as well.

    Raises:
        ConfigError: the folder was made by another model, from another source or with other settings, or the model
            lacks an output that a sink needs.
        InputError: the source can't be read further, or the folder can't be written; what is safe stays.
    """
    try:
        for name, sink in sinks.items():
            if lacking := set(sink.outputs).difference(segmenter.outputs):
                raise ConfigError(f"{name} needs the model's {', '.join(lacking)}, and it was opened without")
        make_folder(options.output)
        if (options.output / MANIFEST_NAME).exists():
            raise ConfigError(
                f"{options.output} holds the masks of images; take another output folder for {source.name}"
            )
        _check_targets(source, sinks, options)
        identity = _identity(segmenter, source, sinks, options)
        with Journal(options.output, identity=identity, overwrite=options.overwrite) as journal, calm_opencv():
            try:
                return _Run(source, segmenter, sinks, options, journal).run(progress or (lambda _: None), stop)
            finally:
                _close(sinks.values())  # before another run gets the folder
    except OSError as exc:
        raise InputError(f"{options.output}: can't be written ({exc.strerror or exc}); what is safe stays") from exc
    finally:
        source.close()
        _close(sinks.values())


def _close(sinks: Iterable[Sink]) -> None:
    """Closes every one, also where a disk is full: what they would still write is not safe, and is made again."""
    for sink in sinks:
        with contextlib.suppress(OSError):
            sink.close()


def _check_targets(source: Source, sinks: Mapping[str, Sink], options: StreamOptions) -> None:
    """Refuses sinks that would write over what they are made from, or over what no run has made.

    Raises:
        ConfigError: one would.
    """
    path = getattr(source, "path", None)
    inputs = [Path(one).resolve() for one in (getattr(source, "paths", None) or ([] if path is None else [path]))]
    strangers = not options.overwrite and not (options.output / JOURNAL_NAME).exists()
    for sink in sinks.values():
        for target in getattr(sink, "targets", ()):
            place = target.resolve()
            if any(one == place or place in one.parents for one in inputs):
                raise ConfigError(f"{target} is where {source.name} lies; take another output folder")
            if strangers and target.exists() and not (target.is_dir() and not any(target.iterdir())):
                raise ConfigError(f"{target} {NOT_OURS}")


class _Run:
    """One call of `segment_stream`."""

    def __init__(
        self,
        source: Source,
        segmenter: Segmenter,
        sinks: Mapping[str, Sink],
        options: StreamOptions,
        journal: Journal,
    ) -> None:
        self.source, self.segmenter, self.sinks, self.options = source, segmenter, sinks, options
        self.journal = journal
        if source.live and not journal.progress.next:  # of a camera that gave nothing there is nothing to keep
            journal.progress = Progress()
        self.before = journal.progress
        self.summary = StreamSummary(output=options.output, source=source.name, count=source.count)
        self.following = self.before.next  # index of the first frame that is not written
        self.damaged_ahead: collections.deque[int] = collections.deque()
        self.latest = (options.policy or ("latest" if source.live else "every")) == "latest"

    def run(self, progress: Callable[[StreamSummary], None], stop: threading.Event | None) -> StreamSummary:
        before, summary = self.before, self.summary
        summary.skipped = before.next
        if self.options.overwrite and self.journal.path.exists():
            self.journal.write()  # before the sinks throw away what it tells of: a kill may come between
        for name, sink in self.sinks.items():
            if not before.finished:
                sink.restore(before.sinks.get(name, {}))
        if before.next and self.source.live:
            self._finish()  # a kill may have kept it from being so
            raise ConfigError(
                f"{self.options.output} holds the masks of a live source, which has no past to go on from; "
                "take another output folder, or --overwrite"
            )
        if not self.journal.path.exists():  # so that what is made from now on is known for a stream's
            self.journal.write()
        if not before.ended:
            self._frames(progress, stop or threading.Event())
        if self.journal.progress.ended:
            self._finish()
        return summary

    def _finish(self) -> None:
        if self.journal.progress.finished:
            return
        for sink in self.sinks.values():
            sink.finish()
        self.journal.progress.ended = self.journal.progress.finished = True
        self.journal.write()

    def _frames(self, progress: Callable[[StreamSummary], None], stop: threading.Event) -> None:
        summary, begin = self.summary, time.perf_counter()
        progress(summary)
        if self._is_full():  # the kill came between the last commit and the end
            self._commit(ended=True)
            return
        committed = begin
        full = False
        flow = Flow(
            self.source,
            self._work,
            policy=self.options.policy,
            workers=1 if self.latest else self.options.workers or usable_cores(),
            start=self.before.next,
            on_damage=self._damage,
        )
        with flow, self._ending(flow, stop):
            for frame, encoded in self._until_error(flow):
                self._write(frame, encoded)
                summary.dropped = flow.dropped
                now = time.perf_counter()
                summary.seconds = now - begin
                if now - committed > COMMIT_SECONDS:
                    self._commit()
                    committed = time.perf_counter()
                progress(summary)
                full = self._is_full()
                if stop.is_set() or full:
                    flow.stop()
                if full:
                    break
            summary.dropped = flow.dropped
        summary.interrupted = stop.is_set() and not full
        ended = not stop.is_set() or full or self.source.live
        if ended and not full:
            self._tell_if_short()
        self._count_damage(to_the_end=ended and not full)
        self._commit(ended=ended)
        summary.seconds = time.perf_counter() - begin
        progress(summary)

    def _tell_if_short(self) -> None:
        """Where a source gave fewer frames than it said, as one does that was cut off, that is damage too."""
        count = self.summary.count
        come = max([self.following, *(index + 1 for index in self.damaged_ahead)])
        if count is not None and come < count and not self.source.live:
            error = f"{self.source.name} ends here, after {come} frames; its header tells of {count}"
            self._damage(Frame(index=come, stamp=0, name="", error=error))

    def _is_full(self) -> bool:
        limit = self.options.max_frames
        return limit is not None and self.before.done + self.summary.done >= limit

    @contextlib.contextmanager
    def _ending(self, flow: Flow[dict[str, Any]], stop: threading.Event) -> Iterator[None]:
        """Ends a live source when `stop` is set within the block: a lost one gives no frame after which to look."""
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if stop.wait(0.1):
                    flow.stop()
                    self.source.close()
                    return

        if not self.source.live:
            yield
            return
        watcher = threading.Thread(target=watch, name="ddsm-stop", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _until_error(self, flow: Flow[dict[str, Any]]) -> Iterator[tuple[Frame, dict[str, Any]]]:
        try:
            yield from flow
        except DdsmError:
            self._commit(ended=self.source.live)  # what came before it is good
            if self.source.live:  # and no later run goes on with it
                self._finish()
            raise

    def _write(self, frame: Frame, encoded: dict[str, Any]) -> None:
        for name, sink in self.sinks.items():
            sink.write(frame, encoded[name])
        self.following = frame.index + 1
        self.summary.done += 1
        self._count_damage()

    def _work(self, frame: Frame) -> dict[str, Any]:
        assert frame.image is not None
        try:
            result = self.segmenter.predict(frame.image)
            return {name: sink.encode(frame, result) for name, sink in self.sinks.items()}
        except cv2.error as exc:
            raise InputError(f"{self.source.name}, frame {frame.index}: {' '.join(exc.err.split())}") from exc
        except DdsmError as exc:
            raise type(exc)(f"{self.source.name}, frame {frame.index}: {exc}") from exc

    def _damage(self, frame: Frame) -> None:
        self.damaged_ahead.append(frame.index)
        if len(self.summary.failures) < LISTED:
            self.summary.failures.append((frame.index, frame.error))

    def _count_damage(self, *, to_the_end: bool = False) -> None:
        """Counts the damaged frames before the one written last: those read ahead are met again after a kill."""
        while self.damaged_ahead and (to_the_end or self.damaged_ahead[0] < self.following):
            self.damaged_ahead.popleft()
            self.summary.damaged += 1

    def _commit(self, *, ended: bool = False) -> None:
        state = self.journal.progress
        self.journal.progress = dataclasses.replace(
            state,
            next=self.following,
            done=self.before.done + self.summary.done,
            damaged=self.before.damaged + self.summary.damaged,
            dropped=self.before.dropped + self.summary.dropped,
            ended=ended,
            sinks={name: sink.commit() for name, sink in self.sinks.items()},
        )
        self.journal.write()


def _identity(segmenter: Segmenter, source: Source, sinks: Mapping[str, Sink], options: StreamOptions) -> Identity:
    """What decides a stream's outputs: its masks' own identity, the source, how much of it, and which sinks."""
    own = identity_of(segmenter)
    outputs = [f"{name} ({made})" if (made := getattr(sink, "products", "")) else name for name, sink in sinks.items()]
    about = {"source": source.name, "outputs": " ".join(sorted(outputs)), "frames": str(options.max_frames or "all")}
    if not source.live:
        content = getattr(source, "content", None)  # of a folder's images, which have no one path
        about["content"] = content() if content is not None else _content(getattr(source, "path", None), source.count)
    return dataclasses.replace(own, settings={**own.settings, **about})


def _content(path: Path | None, count: int | None) -> str:
    """Tells a file, or a folder's files, from others of the same name; of all else only how many frames there are."""
    if path is None:
        return f"{count} frames"
    files = [entry.stat() for entry in (sorted(path.iterdir()) if path.is_dir() else [path]) if entry.is_file()]
    return f"{sum(f.st_size for f in files)} bytes of {max((f.st_mtime_ns for f in files), default=0)}"
