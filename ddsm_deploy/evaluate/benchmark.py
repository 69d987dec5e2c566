"""Latency, throughput, start-up time and memory of a model on every backend that is installed.

Each backend and precision runs in a process of its own, one image at a time (batch 1). All processes stay open, and
rounds of a few runs alternate over them, so that a change in the machine's speed or load meets all alike. Every timed
run counts: no outlier is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import (
    BACKENDS,
    FILE_KINDS,
    SPECIAL_KINDS,
    BackendStatus,
    EngineOptions,
    in_words,
    possible_precisions,
    usable_backends,
)
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.evaluate.worker import SETTLING_RUNS, WARM_UP_SECONDS, Task
from ddsm_deploy.frames import images_in

ROUND = 10
"""Timed runs before the next backend's turn."""

MAX_IMAGES = 32
"""Images held in memory, decoded, by each process; of more, so many are taken at equal distances."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to measure.

    Attributes:
        backends: of `ddsm_deploy.engines.BACKENDS`; none means all that the model has a file for.
        precisions: tried on each backend; none means all that it may make of the model's files. One that this machine
            can't run becomes a row with its reason.
        samplings: ``fused``, ``portable`` or both, a row each; none is fused where it can be had.
        provider: of onnxruntime, ``cpu``, ``cuda`` or ``tensorrt``; the other backends are run as ever.
        threads: of one inference; None leaves it to each runtime.
        runs: timed runs a row.
        seconds: no further round for a row whose timed runs have taken this long.
        warm_up: untimed runs before the first timed one.
        images: folder of images to run on in turn; None means noise at the model's input size.
    """

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    samplings: tuple[str, ...] = ()
    provider: str = "cpu"
    threads: int | None = None
    runs: int = 100
    seconds: float = 60.0
    warm_up: int = 10
    images: Path | None = None

    def __post_init__(self) -> None:
        for backend in self.backends:
            if backend not in BACKENDS:
                raise ConfigError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        for precision in (None, *self.precisions):
            EngineOptions(precision=precision, threads=self.threads)  # checks both
        for sampling in self.samplings:
            EngineOptions(sampling=sampling)
        EngineOptions(provider=self.provider)
        if self.runs < 1:
            raise ConfigError(f"runs is {self.runs}; expected at least 1")
        if self.warm_up < 0:
            raise ConfigError(f"warm-up is {self.warm_up} runs; expected at least 0")
        if not self.seconds > 0:
            raise ConfigError(f"the time limit is {self.seconds} seconds; expected more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One backend at one precision.

    Attributes:
        backend: as asked for.
        precision: what really ran; what was asked for where nothing ran (None: the model's own).
        sampling: likewise.
        provider: of onnxruntime.
        threads: as asked for; None leaves it to the runtime.
        load_ms: from nothing imported to ready: importing the runtime, reading and compiling the model.
        first_ms: the first inference, end to end.
        latencies_ms: every timed run, in order: from a uint8 image in memory to its mask at the image's size.
        inferences_ms: the same runs' inference alone, without resizing the image and the mask.
        peak_mb: most memory that the process held, 10⁶ bytes; decoded images included.
        error: why there is no figure; empty where there are figures.
    """

    backend: str
    precision: str | None
    threads: int | None
    sampling: str | None = None
    provider: str = "cpu"
    load_ms: float = math.nan
    first_ms: float = math.nan
    latencies_ms: tuple[float, ...] = ()
    inferences_ms: tuple[float, ...] = ()
    peak_mb: float | None = None
    error: str = ""

    @property
    def label(self) -> str:
        """Backend, provider, precision and sampling in words."""
        return in_words(self.backend, self.precision or "", self.sampling or "", self.provider)

    @property
    def fps(self) -> float:
        """Frames a second, one after the other: runs by their summed time."""
        return 1000 * len(self.latencies_ms) / sum(self.latencies_ms)

    def percentile(self, share: float) -> float:
        """Latency that `share` per cent of the runs kept to, milliseconds (linear between neighbours)."""
        return float(np.percentile(self.latencies_ms, share))

    def fields(self) -> dict[str, Any]:
        """The row as JSON values."""
        asked = {key: getattr(self, key) for key in ("backend", "precision", "sampling", "threads")} | {"batch": 1}
        if self.backend == "onnxruntime":
            asked["provider"] = self.provider
        if self.error:
            return {**asked, "error": self.error}
        return {
            **asked,
            "runs": len(self.latencies_ms),
            "p50_ms": self.percentile(50),
            "p95_ms": self.percentile(95),
            "p99_ms": self.percentile(99),
            "max_ms": max(self.latencies_ms),
            "mean_ms": float(np.mean(self.latencies_ms)),
            "infer_p50_ms": float(np.percentile(self.inferences_ms, 50)),
            "infer_p99_ms": float(np.percentile(self.inferences_ms, 99)),
            "fps": self.fps,
            "load_ms": self.load_ms,
            "first_ms": self.first_ms,
            "peak_mb": self.peak_mb,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchResult:
    """All rows, and what they were measured on.

    Attributes:
        size: height and width that the network ran at; None where that was each image's own.
        interrupted: by Ctrl-C, and what was not timed by then is left out.
    """

    model: str
    size: tuple[int, int] | None
    images: str
    options: BenchOptions
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    interrupted: bool = False

    def not_run(self) -> tuple[str, ...]:
        """Backends, precisions and ways of sampling that were asked for by name and of which no row has figures."""
        ran = [(row.backend, row.precision, row.sampling) for row in self.rows if not row.error]
        asked = (self.options.backends, self.options.precisions, self.options.samplings)
        return tuple(
            name
            for place, names in enumerate(asked)
            for name in dict.fromkeys(names)
            if all(row[place] != name for row in ran)
        )

    def to_json(self) -> str:
        """The result as JSON text: ``machine``, ``method`` and ``rows``, times in milliseconds."""
        method = {
            "images": self.images,
            "batch": 1,
            "runs": self.options.runs,
            "seconds": self.options.seconds,
            "warm_up_runs": self.options.warm_up,
            "warm_up_seconds": WARM_UP_SECONDS,
            "order": f"one process a row; rounds of {ROUND} runs alternate over the rows; {SETTLING_RUNS} untimed runs "
            "begin each round; no outlier is removed",
        }
        fields = {
            "model": self.model,
            "height": None if self.size is None else self.size[0],
            "width": None if self.size is None else self.size[1],
            "machine": self.machine,
            "method": method,
            "rows": [row.fields() for row in self.rows],
            "interrupted": self.interrupted,
        }
        return json.dumps(fields, indent=2, ensure_ascii=False)


def bench(
    model: str | Path | None = None,
    options: BenchOptions | None = None,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Measures a model on each backend and precision. Ctrl-C ends it, with the rows of which there are figures.

    Args:
        model: file, bundle folder or shipped name; None is the default model.
        options: how to measure.
        progress: called with what is going on, the timed runs done over all rows, and those planned.

    Raises:
        ArtifactError: no such model, or it is damaged.
        InputError: `options.images` holds no image.
    """
    options = options or BenchOptions()
    report = progress or (lambda text, done, planned: None)
    artifact = resolve(model)
    machine = machine_facts()  # before anything runs: its load average is that of the others
    images = list_images(options.images) if options.images else ()
    with contextlib.ExitStack() as stack:
        workers = []
        for task in _tasks(model, artifact, options, images):
            report(f"opening {task.backend}", 0, options.runs)
            workers.append(stack.enter_context(Worker(task)))
        interrupted = False
        try:
            _alternate([worker for worker in workers if not worker.error], options, report)
        except KeyboardInterrupt:  # in the workers as well, whose failures are no findings now
            interrupted = True
        done = [worker for worker in workers if worker.times] if interrupted else workers
        rows = [worker.row() for worker in done]
        open_sizes = images and any(worker.open_size for worker in workers)
    return BenchResult(
        model=artifact.name,
        size=None if open_sizes else (artifact.spec.height, artifact.spec.width),
        interrupted=interrupted,
        images=f"{len(images)} of {options.images}" if images else "noise at the model's input size",
        options=options,
        machine=machine,
        rows=(*rows, *_not_installed(artifact, options)),
    )


def list_images(folder: Path) -> tuple[str, ...]:
    """At most `MAX_IMAGES` image files of a folder and those below it, sorted, at equal distances in that order.

    Raises:
        InputError: no such folder, or no image in it.
    """
    found = images_in(folder)
    return tuple(str(path) for path in found[:: math.ceil(len(found) / MAX_IMAGES)])


def _tasks(model: str | Path | None, artifact: Artifact, options: BenchOptions, images: Sequence[str]) -> list[Task]:
    return [
        Task(
            model=None if model is None else str(model),
            backend=status.backend,
            precision=precision,
            sampling=sampling,
            provider=options.provider if status.backend == "onnxruntime" else "cpu",
            threads=options.threads,
            warm_up=options.warm_up,
            images=tuple(images),
        )
        for status in _wanted(artifact, options)
        if status.available
        for precision in dict.fromkeys(options.precisions) or _tried(artifact, status.backend)
        for sampling in dict.fromkeys(options.samplings) or [None]
    ]


def _tried(artifact: Artifact, backend: str) -> list[str | None]:
    possible = possible_precisions(artifact, backend)
    if artifact.variants:
        return [*possible] or [None]
    # of a file alone the first is its own, which is the engine's to name: a float16 graph may have to run in float32
    return [None, *(precision for precision in possible if precision != artifact.spec.precision)]


def _not_installed(artifact: Artifact, options: BenchOptions) -> list[Row]:
    return [
        Row(backend=status.backend, precision=None, threads=options.threads, error=status.reason)
        for status in _wanted(artifact, options)
        if not status.available
    ]


def _wanted(artifact: Artifact, options: BenchOptions) -> list[BackendStatus]:
    """The backends asked for, or all; those of `SPECIAL_KINDS` only where the model has such, and then for a served one
    no others."""
    if options.backends:
        return [status for status in usable_backends() if status.backend in options.backends]
    served = "endpoint" in artifact.files
    return [
        status
        for status in usable_backends()
        if not (served or FILE_KINDS[status.backend] in SPECIAL_KINDS) or possible_precisions(artifact, status.backend)
    ]


def _alternate(workers: list[Worker], options: BenchOptions, report: Callable[[str, int, int], None]) -> None:
    planned = options.runs * len(workers)
    while True:
        waiting = [w for w in workers if not w.error and w.spent < options.seconds and len(w.times) < options.runs]
        if not waiting:
            return
        for worker in waiting:
            done = sum(len(w.times) for w in workers)
            report(in_words(worker.task.backend, worker.precision or "", worker.sampling or ""), done, planned)
            worker.round(min(ROUND, options.runs - len(worker.times)))


class Worker:
    """The parent's end of one worker process; a failure becomes its `error`."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.precision, self.sampling = task.precision, task.sampling
        self.times: list[tuple[float, float]] = []
        self.error = ""
        self.open_size = False
        self._peak_mb: float | None = None
        self._load_ms = self._first_ms = math.nan

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile()
        # -P: a file of the current folder must not pass for a module of the same name
        command = [sys.executable, "-P", "-m", "ddsm_deploy.evaluate.worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8"
        )
        answer = self._ask(dataclasses.asdict(self.task))
        if not self.error:
            self.precision, self.sampling = answer["precision"], answer["sampling"]
            self.open_size = answer["open_size"]
            self._load_ms, self._first_ms = answer["load_ms"], answer["first_ms"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def spent(self) -> float:
        """Seconds of timed runs so far."""
        return sum(latency for latency, _ in self.times) / 1000

    def round(self, runs: int) -> None:
        """Adds so many timed runs to `times`: pairs (end to end, inference alone), milliseconds."""
        answer = self._ask({"runs": runs})
        if not self.error:
            self.times += [(latency, inference) for latency, inference in answer["times_ms"]]
            self._peak_mb = answer["peak_mb"]

    def row(self) -> Row:
        """The figures so far, or the error."""
        row = Row(
            backend=self.task.backend,
            precision=self.precision,
            sampling=self.sampling,
            provider=self.task.provider,
            threads=self.task.threads,
            error=self.error,
        )
        if self.error:
            return row
        latencies, inferences = zip(*self.times, strict=True)
        return dataclasses.replace(
            row,
            latencies_ms=latencies,
            inferences_ms=inferences,
            load_ms=self._load_ms,
            first_ms=self._first_ms,
            peak_mb=self._peak_mb,
        )

    def _ask(self, fields: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        with contextlib.suppress(BrokenPipeError):  # it died: told from its exit code below
            self._process.stdin.write(json.dumps(fields) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": self._death()}
        self.error = answer.get("error", "")
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f": {lines[-1]}" if lines else "")
