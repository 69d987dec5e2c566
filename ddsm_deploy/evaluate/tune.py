"""Tuning: what ``backend="auto"`` decides in seconds, decided at length, with the engines' own options.

Candidates are the backends and precisions that pass the gate (see `runtime.gate`) × threads, ONNX Runtime's spinning,
and OpenVINO's streams and hint. All are open at once, and rounds alternate over them, so that a change in the machine's
speed or load meets all alike. Every timed run counts: no outlier is removed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import Engine, EngineOptions, open_engine
from ddsm_deploy.errors import BackendError, ConfigError, DdsmError, InputError
from ddsm_deploy.evaluate.benchmark import list_images
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.candidates import Candidate, Candidates, judge, open_candidates
from ddsm_deploy.runtime.choice import decide, pick
from ddsm_deploy.runtime.decisions import GOALS, Decision, facts_of, keep, usable_cores
from ddsm_deploy.runtime.gate import frames_for

SLICE_RUNS, SLICE_SECONDS = 10, 0.5
"""A candidate's turn ends after so many runs of each worker, or so many seconds, whichever comes first."""

SETTLING_RUNS = 1
"""Untimed runs at the start of a turn: while others ran, caches were filled with their data."""

MAX_IMAGES = 8
"""Of a folder's images so many are compared and timed on, at equal distances."""

BATCHES = (2, 4)
"""Images in one inference, tried for throughput where the model's file leaves the batch open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What to tune for, and for how long.

    Attributes:
        goal: ``latency`` (one image after the other) or ``throughput`` (as many at once as there are cores).
        images: folder of images to compare and time on; None means the package's own frames.
        seconds: of timed runs, all candidates together; each gets at least one turn.
    """

    goal: str = "latency"
    images: Path | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ConfigError(f"the goal is {self.goal!r}; expected {' or '.join(GOALS)}")
        if not self.seconds > 0:
            raise ConfigError(f"the time is {self.seconds} seconds; expected more than 0")


@dataclasses.dataclass(kw_only=True)
class Row:
    """One candidate with its options, and what it did.

    Attributes:
        candidate: backend, precision, options; agreement with the reference; ``ms`` is what the goal compares:
            the median latency, or milliseconds a frame.
        batch: images in one inference.
        workers: inferences that run at once.
        usual: whether these are the options that it gets untuned.
        latencies_ms: of every timed inference, in order.
        seconds: wall time of them all.
    """

    candidate: Candidate
    batch: int = 1
    workers: int = 1
    usual: bool = False
    latencies_ms: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def fps(self) -> float:
        """Frames a second, over all workers."""
        return len(self.latencies_ms) * self.batch / self.seconds if self.seconds else math.nan

    def percentile(self, share: float) -> float:
        """Latency that `share` per cent of the inferences kept to, milliseconds."""
        return float(np.percentile(self.latencies_ms, share)) if self.latencies_ms else math.nan

    def label(self) -> str:
        """Backend, precision and options in words."""
        batch = f" batch={self.batch}" if self.batch > 1 else ""
        return self.candidate.trial().label() + batch

    def fields(self) -> dict[str, Any]:
        """The row as JSON values."""
        one = self.candidate
        asked = {
            "backend": one.backend,
            "precision": one.precision,
            "sampling": one.sampling,
            "options": dict(one.options),
            "batch": self.batch,
            "workers": self.workers,
            "usual": self.usual,
            "changed": one.changed,
            "allowed": one.allowed,
        }
        if not self.latencies_ms:
            return {**asked, "error": one.objection}
        figures = {
            "runs": len(self.latencies_ms),
            "p50_ms": self.percentile(50),
            "p99_ms": self.percentile(99),
            "max_ms": max(self.latencies_ms),
            "fps": self.fps,
        }
        return {**asked, **figures}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What was measured, and what is chosen from now on.

    Attributes:
        model: its name.
        options: of the tuning.
        machine: see `machine.machine_facts`.
        rows: every candidate.
        best: the one that is chosen.
        usual: the best of those with the options that they get untuned.
        decision: as it is kept.
        kept: the file; None where it could not be written, and ``auto`` goes on as before.
        batch: what there is to say about batches.
    """

    model: str
    options: TuneOptions
    machine: dict[str, Any]
    rows: tuple[Row, ...]
    best: Row
    usual: Row
    decision: Decision
    kept: Path | None
    batch: str

    @property
    def gain(self) -> float:
        """How many times faster than untuned, by what the goal compares."""
        return (self.usual.candidate.ms or math.nan) / (self.best.candidate.ms or math.nan)

    def to_json(self) -> str:
        """The result as JSON text."""
        fields = {
            "model": self.model,
            "for": self.options.goal,
            "seconds": self.options.seconds,
            "frames": self.decision.frames,
            "noise": self.decision.noise,
            "reference": self.decision.reference,
            "machine": self.machine,
            "rows": [row.fields() for row in self.rows],
            "best": self.rows.index(self.best),
            "usual": self.rows.index(self.usual),
            "gain": self.gain,
            "batch": self.batch,
            "kept": None if self.kept is None else str(self.kept),
        }
        return json.dumps(fields, indent=2, ensure_ascii=False)


def tune(
    model: str | Path | Artifact | None = None,
    options: TuneOptions | None = None,
    *,
    progress: Callable[[str, float], None] | None = None,
) -> TuneResult:
    """Measures every candidate at length and keeps the decision, which ``auto`` uses from then on.

    Args:
        model: file, bundle or shipped name; None is the default model.
        options: what to tune for.
        progress: called with what is going on and the share of the time that is over, 0..1.

    Raises:
        ArtifactError: no such model, or it is damaged.
        InputError: `options.images` holds no image.
        BackendError: nothing but torch can run it.
        GateError: nothing passes the gate.
    """
    options = options or TuneOptions()
    report = progress or (lambda text, share: None)
    artifact = model if isinstance(model, Artifact) else resolve(model)
    machine = machine_facts()  # before anything runs: its load average is that of the others
    spec = artifact.spec
    images, source = _images(options.images)
    frames = frames_for(spec, images, (spec.height, spec.width), source=source)
    facts = facts_of(artifact, EngineOptions(), goal=options.goal)
    report("comparing", 0.0)
    with contextlib.ExitStack() as stack:
        candidates = stack.enter_context(open_candidates(artifact, EngineOptions()))
        if not candidates.found:
            raise BackendError(f"nothing to tune: no backend but torch can run it: {'; '.join(candidates.others)}")
        gate = judge(candidates, frames, spec)
        rows = [row for one in candidates.found for row in _rows_of(one, options.goal)]
        _open_all(rows, artifact, stack, report)
        _measure(rows, frames.feeds, options, report)
        able = [row for row in rows if row.batch == 1 and row.latencies_ms]
        best = _best(able, artifact.name) if able else _best(rows, artifact.name)
        usual = _best([row for row in able if row.usual] or able, artifact.name)
        every = Candidates(
            found=[row.candidate for row in rows if row.batch == 1],
            others=candidates.others,
            reference=candidates.reference,
        )
        decision = decide(every, best.candidate, facts=facts, frames=frames, gate=gate)
        decision = dataclasses.replace(decision, tuned=True)
    return TuneResult(
        model=artifact.name,
        options=options,
        machine=machine,
        rows=tuple(rows),
        best=best,
        usual=usual,
        decision=decision,
        kept=keep(decision),
        batch=_batch_note(rows, options.goal),
    )


def settings(backend: str, goal: str, cores: int) -> Iterator[dict[str, Any]]:
    """The options to try on a backend; the first are those that it gets untuned."""
    fewer = sorted({1, 2, cores // 2} & set(range(1, cores)))
    match backend, goal:
        case "onnxruntime", "latency":
            for threads in ({}, *({"threads": count} for count in fewer)):
                yield from (threads, {**threads, "spinning": False})
        case "openvino", "latency":
            yield from ({}, *({"threads": count} for count in fewer))
        case "onnxruntime", _:
            for threads in ({"threads": 1}, {"threads": cores}) if cores > 1 else ({"threads": 1},):
                yield from (threads, {**threads, "spinning": False})
        case "openvino", _:
            for streams in (cores, *reversed(fewer)):
                yield {"threads": cores, "streams": streams, "hint": "throughput"}
        case _:
            yield {}


def _images(folder: Path | None) -> tuple[list[Image] | None, str]:
    if folder is None:
        return None, ""
    found = list_images(folder)
    chosen = found[:: math.ceil(len(found) / MAX_IMAGES)]
    return [read_image(path) for path in chosen], f"{len(chosen)} images of {folder}"


def _rows_of(candidate: Candidate, goal: str) -> Iterator[Row]:
    """A candidate with every set of options; one that did not pass stays as it is, to be shown."""
    if candidate.objection:
        yield Row(candidate=dataclasses.replace(candidate, engine=None), usual=True)
        return
    workers = usable_cores() if goal == "throughput" else 1
    for index, chosen in enumerate(settings(candidate.backend, goal, usable_cores())):
        one = dataclasses.replace(candidate, options=chosen, engine=None)
        yield Row(candidate=one, workers=workers, usual=index == 0)
        if index == 0 and goal == "throughput" and candidate.engine and candidate.engine.inputs[0].shape[0] is None:
            for batch in BATCHES:
                yield Row(candidate=dataclasses.replace(one), batch=batch, workers=workers)


def _open_all(
    rows: Sequence[Row], artifact: Artifact, stack: contextlib.ExitStack, report: Callable[[str, float], None]
) -> None:
    for row in rows:
        one = row.candidate
        if one.objection:
            continue
        report(f"opening {row.label()}", 0.0)
        try:
            one.engine = open_engine(artifact, one.backend, one.trial().applied(EngineOptions()))
        except DdsmError as exc:
            one.objection = str(exc)
        else:
            stack.callback(one.engine.close)


def _measure(
    rows: Sequence[Row], feeds: Sequence[Image], options: TuneOptions, report: Callable[[str, float], None]
) -> None:
    running = [row for row in rows if row.candidate.engine is not None]
    while running and (spent := sum(row.seconds for row in running)) < options.seconds:
        for row in running:
            report(row.label(), min(1.0, (spent + row.seconds) / options.seconds))
            engine = row.candidate.engine
            assert engine is not None
            try:
                _turn(row, engine, feeds)
            except (BackendError, InputError) as exc:
                row.candidate.objection, row.candidate.engine = str(exc), None
        running = [row for row in running if row.candidate.engine is not None]
    for row in running:
        row.candidate.ms = row.percentile(50) if options.goal == "latency" else 1000 / row.fps


def _turn(row: Row, engine: Engine, feeds: Sequence[Image]) -> None:
    """Adds some timed runs: `row.workers` threads, each of which runs one inference after another."""
    name = engine.inputs[0].name
    batches = [{name: np.concatenate([feed] * row.batch)} for feed in feeds]

    def work(first: int) -> list[float]:
        times: list[float] = []
        until = time.perf_counter() + SLICE_SECONDS
        while not times or (len(times) < SLICE_RUNS and time.perf_counter() < until):
            start = time.perf_counter()
            engine.run(batches[(first + len(times)) % len(batches)])
            times.append((time.perf_counter() - start) * 1e3)
        return times

    for _ in range(SETTLING_RUNS):
        engine.run(batches[0])
    start = time.perf_counter()
    if row.workers == 1:
        row.latencies_ms += work(0)
    else:
        with concurrent.futures.ThreadPoolExecutor(row.workers) as pool:
            for times in pool.map(work, range(row.workers)):
                row.latencies_ms += times
    row.seconds += time.perf_counter() - start


def _best(rows: Sequence[Row], name: str) -> Row:
    best = pick([row.candidate for row in rows], name)
    return next(row for row in rows if row.candidate is best)


def _batch_note(rows: Sequence[Row], goal: str) -> str:
    if goal == "latency":
        return "batch: one image at a time; larger ones only delay the first (tried with --for throughput)"
    if any(row.batch > 1 for row in rows):
        return "batch: above 1 only for comparison; ddsm runs frames side by side, each alone"
    return "batch: the model's files are fixed to 1 (export one with --dynamic batch to try more)"


def difference(best: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    """What differs between two rows' `Row.fields`, in words; empty where nothing does."""
    keys = ("backend", "precision", "batch")
    changed = [f"{key} {usual[key]} → {best[key]}" for key in keys if best[key] != usual[key]]
    for key in sorted({*best["options"], *usual["options"]}):
        before, after = usual["options"].get(key, "default"), best["options"].get(key, "default")
        if before != after:
            changed.append(f"{key} {before} → {after}")
    return ", ".join(changed)
