"""``backend="auto"``: the quickest backend that can do what was asked, found by a short measurement, and why."""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import BACKENDS, FILE_KINDS, Engine, EngineOptions, open_engine, usable_backends
from ddsm_deploy.errors import BackendError, ConfigError

TIMED_RUNS = 3
TIME_LIMIT = 0.5
"""Seconds of timed runs a backend; a large model gets fewer than `TIMED_RUNS`, but at least one."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An open engine, and the sentence that says why it is this one."""

    engine: Engine
    reason: str


def choose(artifact: Artifact, options: EngineOptions, *, size: tuple[int, int] | None = None) -> Choice:
    """Opens every backend that has a file to run, times them on one image of noise, and keeps the quickest.

    torch is opened only where nothing else can run: it takes seconds to load, and eager inference has never been the
    quickest way.

    Args:
        artifact: the model.
        options: what every candidate must be able to do.
        size: height and width of the timed image, where the model leaves them open; None is the spec's size.

    Raises:
        BackendError: no backend can do what was asked; the message says why for each.
        ArtifactError: the model's file is damaged.
    """
    passed_over: list[str] = []
    candidates = _open_all(tuple(b for b in BACKENDS if b != "torch"), artifact, options, passed_over)
    if not candidates:
        candidates = _open_all(("torch",), artifact, options, passed_over)
    elif "checkpoint" in artifact.files:
        passed_over.append("torch not tried (eager, and slow to load)")
    if not candidates:
        raise BackendError(f"no backend can run {artifact.name}: {'; '.join(passed_over)}")
    if len(candidates) == 1:
        best = candidates[0]
        reason = f"{best.backend} {best.precision}, the only one that can run this"
        return Choice(best, "; ".join([reason, *passed_over]))

    height, width = size or (artifact.spec.height, artifact.spec.width)
    times = {engine.backend: _time_of(engine, height, width) for engine in candidates}
    best, *others = sorted(candidates, key=lambda engine: times[engine.backend])
    for engine in others:
        engine.close()
    slower = [f"{engine.backend} slower ({times[engine.backend]:.1f} ms)" for engine in others]
    reason = f"{best.backend} {best.precision} ({times[best.backend]:.1f} ms)"
    return Choice(best, "; ".join([reason, *slower, *passed_over]))


def _open_all(
    backends: tuple[str, ...], artifact: Artifact, options: EngineOptions, passed_over: list[str]
) -> list[Engine]:
    status = {entry.backend: entry for entry in usable_backends()}
    opened = []
    for backend in backends:
        if not status[backend].available:
            passed_over.append(status[backend].reason)
        elif FILE_KINDS[backend] not in artifact.files:
            passed_over.append(f"{backend} needs the model's {FILE_KINDS[backend]} file, which is not there")
        else:
            try:
                opened.append(open_engine(artifact, backend, options))
            except (BackendError, ConfigError) as exc:
                passed_over.append(str(exc))
    return opened


def _time_of(engine: Engine, height: int, width: int) -> float:
    """The shortest of a few runs after one to warm up, in milliseconds."""
    image = engine.inputs[0]
    shape = [fixed or given for fixed, given in zip(image.shape, (1, height, width, 3), strict=True)]
    feeds = {image.name: np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)}
    engine.run(feeds)
    times: list[float] = []
    while not times or (len(times) < TIMED_RUNS and sum(times) < TIME_LIMIT):
        start = time.perf_counter()
        engine.run(feeds)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3
