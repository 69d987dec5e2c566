"""`segment_files`: images on disk to masks on disk, resumable, in bounded memory.

Each of `workers` threads takes whole frames: it decodes, infers, encodes and writes one after another, while the others
do the same with theirs. So decoding one frame overlaps inference of another, no stage waits on a queue, and memory
holds one frame a worker. The runtimes and OpenCV let go of Python's lock while they compute. The engine should run an
inference on one thread (`open_for_batch` sees to it): frames side by side keep the cores busier than one frame on all.

The calling thread gathers the results in the order of the sources and alone writes the manifest.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import ConfigError, DdsmError, InputError
from ddsm_deploy.listing import JOURNAL_NAME, MANIFEST_NAME, NOT_OURS
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.runtime.coco import write_coco
from ddsm_deploy.runtime.decisions import Decision, facts_of, recall, usable_cores
from ddsm_deploy.runtime.manifest import Identity, Manifest
from ddsm_deploy.runtime.outputs import Products, remove_temporaries, temporary_beside
from ddsm_deploy.runtime.segmenter import AUTO, Segmenter
from ddsm_deploy.runtime.sources import Source, find_sources
from ddsm_deploy.runtime.worker import Frame, SegmentOptions, Worker

COCO_FILE = "annotations.json"

_QUEUED = 4
"""Frames a worker may be ahead of the oldest unfinished one. Finished ones wait as records, not as images."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An input that gave no output, and why."""

    source: str
    error: str


@dataclasses.dataclass(kw_only=True)
class SegmentSummary:
    """How a run went.

    Attributes:
        output: the folder written to; text where it may be a URI.
        found: inputs found.
        done: inputs segmented now.
        skipped: inputs that an earlier run had finished.
        failures: inputs that gave no output.
        seconds: wall time over the inputs, without listing them and loading the model.
        interrupted: whether it was asked to stop before the end.
        stopped: why it stopped before the end by itself (a full disk), or an empty text.
    """

    output: Path | str
    found: int
    done: int = 0
    skipped: int = 0
    failures: list[Failure] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False
    stopped: str = ""

    @property
    def fps(self) -> float:
        """Frames segmented a second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def complete(self) -> bool:
        """Whether every input has its outputs."""
        return self.done + self.skipped == self.found

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        fields = dataclasses.asdict(self)
        return {**fields, "output": str(self.output), "failed": len(self.failures), "fps": self.fps}


def segment_files(
    sources: Sequence[str | Path],
    segmenter: Segmenter,
    options: SegmentOptions,
    *,
    progress: Callable[[SegmentSummary], None] | None = None,
    stop: threading.Event | None = None,
) -> SegmentSummary:
    """Segments images into ``options.output`` and keeps a manifest there; one bad image never stops the rest.

    Args:
        sources: files, folders and globs, see `find_sources`.
        segmenter: best from `open_for_batch`.
        options: what to make, and where.
        progress: called in this thread at the start and after each input, with the summary so far.
        stop: once set, no further input is begun; those begun are finished.

    Raises:
        InputError: a source is missing, or the output folder can't be written.
        ConfigError: the folder was made by another model, with other settings, from other sources or from a stream, or
            the model lacks an output that is asked for.
    """
    if options.products.confidence and "confidence" not in segmenter.outputs:
        raise ConfigError(
            f"{segmenter.spec.name} was opened without its confidence output (it gives {', '.join(segmenter.outputs)})"
        )
    stop = stop or threading.Event()
    found = find_sources(sources, options.output)
    make_folder(options.output)
    if (options.output / JOURNAL_NAME).exists():
        raise ConfigError(f"{options.output} holds the masks of a stream; take another output folder for images")
    check_targets(found, options.output, options.products, overwrite=options.overwrite)
    identity = identity_of(segmenter)
    with Manifest(options.output / MANIFEST_NAME, identity=identity, overwrite=options.overwrite) as manifest:
        check_owners(found, manifest, options.output)
        clear(options.output)
        worker = Worker(segmenter, options, identity)
        todo = [source for source in found if not worker.has_finished(source, manifest)]
        summary = SegmentSummary(output=options.output, found=len(found), skipped=len(found) - len(todo))
        report = progress or (lambda _: None)
        report(summary)
        begin = time.perf_counter()
        with calm_opencv():
            for frame in _in_order(worker, todo, options.workers or usable_cores(), lambda: _ended(summary, stop)):
                collect(frame, manifest, summary)
                summary.seconds = time.perf_counter() - begin
                report(summary)
        summary.interrupted = stop.is_set() and summary.done + len(summary.failures) < len(todo)
        if options.products.polygons == "coco":
            _join_coco(found, manifest, segmenter, options.output, summary)
    return summary


def open_for_batch(
    model: str | Path | None = None,
    *,
    backend: str = AUTO,
    precision: str | None = None,
    fit: str = "stretch",
    workers: int | None = None,
    outputs: tuple[str, ...] = ("mask",),
    provider: str = "cpu",
    sampling: str | None = None,
    fresh: bool = False,
) -> Segmenter:
    """Opens a model as `segment_files` runs it best: each inference on one thread, as many side by side as `workers`.

    Args:
        model: see `Segmenter.open`, as for the others.
        backend: ``auto`` takes what ``ddsm tune --for throughput`` found, or else what is quickest on one thread.
        precision: None is the model's own, with ``auto`` whichever is quickest.
        fit: ``stretch`` or ``letterbox``.
        workers: None is one a core.
        outputs: those wanted; others are not computed.
        provider: of onnxruntime.
        sampling: ``fused`` or ``portable``; None is fused where it can be had.
        fresh: for ``auto``: measure now, whatever was kept.

    Raises:
        DdsmError: as `Segmenter.open`.
    """
    artifact = resolve(model)
    options = EngineOptions(precision=precision, outputs=outputs, provider=provider, sampling=sampling)
    count = workers or usable_cores()
    if backend == AUTO and not fresh and count == usable_cores():
        tuned = recall(facts_of(artifact, options, goal="throughput"))
        if tuned is not None:
            with contextlib.suppress(DdsmError):  # what ran then no longer does
                return _open_tuned(artifact, tuned, options, fit)
    options = dataclasses.replace(options, threads=1)
    segmenter = Segmenter.open(artifact, backend=backend, fit=fit, options=options, fresh=fresh)
    if backend == AUTO and segmenter.backend != "triton":  # whose threads are the server's
        segmenter.choice += "; a frame alone on one thread each"  # while a batch runs several side by side
    if segmenter.backend != "openvino":
        return segmenter
    # OpenVINO fixes how many inferences run side by side when it compiles, and counts threads over all of them.
    assert segmenter.options is not None
    segmenter.close()
    options = dataclasses.replace(segmenter.options, threads=count, streams=count, hint="throughput")
    reopened = Segmenter.open(artifact, backend="openvino", fit=fit, options=options)
    reopened.choice, reopened.decision = segmenter.choice, segmenter.decision
    return reopened


@contextlib.contextmanager
def calm_opencv() -> Iterator[None]:
    """OpenCV on the calling thread alone, as the workers fill the cores, and silent, as errors come as exceptions."""
    threads, level = cv2.getNumThreads(), cv2.utils.logging.getLogLevel()
    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        cv2.utils.logging.setLogLevel(level)


def _open_tuned(artifact: Artifact, tuned: Decision, options: EngineOptions, fit: str) -> Segmenter:
    chosen = tuned.chosen
    segmenter = Segmenter.open(artifact, backend=chosen.backend, fit=fit, options=chosen.applied(options))
    segmenter.choice, segmenter.decision = tuned.text(now=False), tuned
    return segmenter


def identity_of(segmenter: Segmenter) -> Identity:
    """What decides a segmenter's masks, as the manifest keeps it."""
    spec = segmenter.spec
    digest = model_sha256(segmenter.file) if segmenter.file else hashlib.sha256(spec.to_json().encode()).hexdigest()
    size = "any" if segmenter.size is None else "x".join(map(str, segmenter.size))
    settings = {"precision": segmenter.precision, "fit": segmenter.fit, "size": size}
    return Identity(model=spec.name, sha256=digest, settings=settings)


def _in_order(worker: Worker, todo: Sequence[Source], workers: int, ended: Callable[[], bool]) -> Iterator[Frame]:
    """Runs the worker over `todo` on `workers` threads and yields in the order of `todo`, never far ahead of it."""
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="ddsm-segment") as pool:
        pending: collections.deque[concurrent.futures.Future[Frame]] = collections.deque()
        remaining = iter(todo)
        try:
            while True:
                if ended():
                    remaining = iter(())
                    pending = collections.deque(future for future in pending if not future.cancel())
                for source in itertools.islice(remaining, workers * _QUEUED - len(pending)):
                    pending.append(pool.submit(worker, source))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _ended(summary: SegmentSummary, stop: threading.Event) -> bool:
    return stop.is_set() or bool(summary.stopped)


def collect(frame: Frame, manifest: Manifest, summary: SegmentSummary) -> None:
    """Puts what a worker gave back into manifest and summary."""
    error = frame.record.get("error", "")
    if frame.hopeless and not summary.stopped:
        summary.stopped = error
    try:
        manifest.add(frame.record)
    except OSError as exc:
        error = error or f"{frame.record['source']}: {manifest.path} can't be written ({exc.strerror or exc})"
        summary.stopped = summary.stopped or error
    if error:
        summary.failures.append(Failure(frame.record["source"], error))
    else:
        summary.done += 1


def make_folder(folder: Path) -> None:
    """Makes an output folder where there is none.

    Raises:
        InputError: it can't be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        why = "it is a file" if isinstance(exc, FileExistsError) else exc.strerror or str(exc)
        raise InputError(f"{folder}: can't be the output folder ({why})") from exc


def clear(folder: Path) -> None:
    """Removes what killed workers left half-written in an output folder.

    Raises:
        InputError: it can't be.
    """
    try:
        remove_temporaries(folder)
    except OSError as exc:
        raise InputError(f"{folder}: left-overs of a killed run can't be removed ({exc.strerror or exc})") from exc


def check_targets(found: Sequence[Source], output: Path, products: Products, *, overwrite: bool) -> None:
    """Refuses a run whose outputs would take the place of its inputs, or of files that no run has written.

    Raises:
        ConfigError: they would.
    """
    folders = {folder for folder in products.files("") if (output / folder).is_dir()}
    if not folders:
        return
    strangers = not overwrite and not (output / MANIFEST_NAME).exists()
    inputs = {os.path.realpath(source.path) for source in found}
    for source in found:
        for folder, file in products.files(source.name).items():
            if folder not in folders:
                continue
            target = os.path.realpath(output / file)
            if target in inputs:
                raise ConfigError(f"{target} is a source, and would be written over; take another output folder")
            if strangers and Path(target).is_file():
                raise ConfigError(f"{target} {NOT_OURS}")


def check_owners(found: Sequence[Source], manifest: Manifest, output: Path | str) -> None:
    """Refuses a run that would write over an earlier one's outputs of other inputs.

    Raises:
        ConfigError: it would.
    """
    owners = {record.name: path for path, record in manifest.finished.items()}
    for source in found:
        owner = owners.get(source.name, source.path)
        if owner != source.path:
            raise ConfigError(
                f"{output} holds the outputs of {owner} under the name that {source.path} would get; "
                "take another output folder, name all sources in one run, or --overwrite"
            )


def _join_coco(
    found: Sequence[Source], manifest: Manifest, segmenter: Segmenter, output: Path, summary: SegmentSummary
) -> None:
    """Makes `COCO_FILE` anew from the parts of all inputs that are finished, by this run or earlier ones."""
    files = Products(polygons="coco").files
    parts = [output / files(source.name)["polygons"] for source in found if source.path in manifest.finished]
    target = output / COCO_FILE
    temporary = temporary_beside(target)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            write_coco(file, parts, segmenter.spec.classes)
        temporary.replace(target)
    except (OSError, ValueError, KeyError) as exc:
        temporary.unlink(missing_ok=True)
        reason = exc.strerror if isinstance(exc, OSError) else "a part is damaged; make it anew with --overwrite"
        summary.stopped = summary.stopped or f"{target}: can't be written ({reason})"
