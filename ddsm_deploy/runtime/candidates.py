"""The candidates of the automatic choice: opened side by side, compared with the reference, and timed in turn."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import (
    BACKENDS,
    FILE_KINDS,
    SPECIAL_KINDS,
    Engine,
    EngineOptions,
    available_precisions,
    open_engine,
    possible_precisions,
    usable_backends,
    why_untried,
)
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, DdsmError, InputError
from ddsm_deploy.runtime.decisions import PASSED_OVER, SLOWER, Trial
from ddsm_deploy.runtime.gate import Frames, Gate
from ddsm_deploy.spec import ModelSpec

ROUNDS, RUNS = 3, 2
"""Rounds over all candidates, and timed runs of each in a round; one untimed run goes before those, because the caches
hold what ran before."""

TIME_LIMIT = 0.5
"""No further round for a candidate whose timed runs have taken this long, seconds."""

NOT_COMPARED = "not compared with fp32, which the model lacks here"


@dataclasses.dataclass(kw_only=True)
class Candidate:
    """One way to run the model. The fields are those of `decisions.Trial`, and become one."""

    backend: str
    precision: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: str = "portable"
    engine: Engine | None = None
    ms: float | None = None
    changed: float | None = None
    allowed: float | None = None
    objection: str = ""

    def trial(self, verdict: str = SLOWER, reason: str = "") -> Trial:
        """It as a record; an objection makes it passed over."""
        return Trial(
            backend=self.backend,
            precision=self.precision,
            options=dict(self.options),
            sampling=self.sampling,
            ms=self.ms,
            changed=self.changed,
            allowed=self.allowed,
            verdict=PASSED_OVER if self.objection else verdict,
            reason=self.objection or reason,
        )


@dataclasses.dataclass(kw_only=True)
class Candidates:
    """Open engines, and why there are no more.

    Attributes:
        found: those that opened, and with an objection those of the model's variants that did not.
        others: reasons why the others are none, a phrase each.
        reference: computes in float32, with standard operators alone; None where the model has no such file here. It
            may be one of `found`.
    """

    found: list[Candidate] = dataclasses.field(default_factory=list)
    others: list[str] = dataclasses.field(default_factory=list)
    reference: Engine | None = None

    @property
    def running(self) -> list[Candidate]:
        """Those against which nothing is known yet."""
        return [candidate for candidate in self.found if candidate.engine is not None and not candidate.objection]


@contextlib.contextmanager
def open_candidates(artifact: Artifact, options: EngineOptions) -> Iterator[Candidates]:
    """Opens every way to run a model without torch, and a float32 reference; closes them all at the end.

    To keep an engine, take it out of its candidate.

    Args:
        artifact: the model.
        options: what every candidate must be able to do. Its precision, if given, is the only one.

    Raises:
        ArtifactError: the model's own file is damaged.
    """
    candidates = Candidates()
    extra: Engine | None = None
    try:
        for backend in usable_here(artifact, candidates.others):
            for precision in _precisions(artifact, backend, options, candidates.others):
                _open(candidates, artifact, backend, dataclasses.replace(options, precision=precision))
        exact = [candidate.engine for candidate in candidates.running if candidate.precision == "fp32"]
        # our own kernels are judged too, beside standard operators
        exact = [engine for engine in exact if engine is not None and engine.sampling != "fused"]
        if candidates.running and not exact:
            extra = _open_reference(artifact, options)
        candidates.reference = exact[0] if exact else extra
        yield candidates
    finally:
        for engine in (extra, *(candidate.engine for candidate in candidates.found)):
            if engine is not None:
                engine.close()


def usable_here(artifact: Artifact, others: list[str]) -> Iterator[str]:
    """The backends but torch that are installed and have a file to run; why not the rest is added to `others`."""
    for status in usable_backends():
        kind = FILE_KINDS[status.backend]
        has_file = bool(possible_precisions(artifact, status.backend))
        if status.backend == "torch" or (kind in SPECIAL_KINDS and not has_file):
            continue
        if not status.available:
            others.append(status.reason)
        elif not has_file:
            others.append(f"{status.backend} needs the model's {kind} file, which is not there")
        else:
            yield status.backend


def judge(candidates: Candidates, frames: Frames, spec: ModelSpec) -> Gate | None:
    """Compares every candidate with the reference; returns the gate, or None where there is no reference."""
    if candidates.reference is None:
        return None
    gate = Gate(candidates.reference, frames, spec)
    for candidate in candidates.running:
        assert candidate.engine is not None
        candidate.allowed = gate.allowed(candidate.precision)
        try:
            result = gate.judge(candidate.engine, candidate.precision)
        except (BackendError, InputError) as exc:
            candidate.objection = str(exc)
            continue
        candidate.changed = result.changed
        candidate.objection = gate.objection(result, candidate.precision)
    return gate


def time_all(found: Sequence[Candidate], frames: Frames) -> None:
    """Sets each candidate's median time; rounds alternate, so that what else the machine does meets all alike."""
    times: list[list[float]] = [[] for _ in found]
    broken = [one.engine is None for one in found]
    for _ in range(ROUNDS):
        for index, one in enumerate(found):
            if broken[index] or sum(times[index]) >= TIME_LIMIT:
                continue
            try:
                times[index] += _round(one, frames)
            except (BackendError, InputError) as exc:
                broken[index] = True
                one.objection = one.objection or str(exc)
    for one, spent, failed in zip(found, times, broken, strict=True):
        one.ms = None if failed else statistics.median(spent) * 1e3


def fixed_size(engine: Engine, artifact: Artifact, size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width at which an engine runs; None where it takes each image as it is.

    Args:
        engine: of the model.
        artifact: named in messages.
        size: asked for.

    Raises:
        ArtifactError: it takes something else than one image.
        ConfigError: it is fixed to another size.
    """
    shape = engine.inputs[0].shape
    if len(engine.inputs) != 1 or len(shape) != 4 or shape[0] not in (None, 1) or shape[3] != 3:
        taken = ", ".join(map(str, engine.inputs))
        raise ArtifactError(
            f"{artifact.name} takes {taken}; expected one image, uint8 1xHxWx3, as `ddsm export` makes it"
        )
    height, width = shape[1:3]
    if height is None or width is None:
        return size
    if size is not None and size != (height, width):
        raise ConfigError(
            f"{artifact.name} is fixed to {height}x{width} and can't run at {size[0]}x{size[1]}; "
            "export it at that size, or with: --dynamic batch,size"
        )
    return height, width


def _round(candidate: Candidate, frames: Frames) -> list[float]:
    assert candidate.engine is not None
    name = candidate.engine.inputs[0].name
    times = []
    for run in range(1 + RUNS):
        start = time.perf_counter()
        candidate.engine.run({name: frames.feeds[run % len(frames.feeds)]})
        times.append(time.perf_counter() - start)
    return times[1:]


def _precisions(artifact: Artifact, backend: str, options: EngineOptions, others: list[str]) -> Sequence[str | None]:
    """What to try on a backend: what is asked for, or all that it can make here of the files that are for it and that
    may be quicker than float32; why not the rest is added to `others`."""
    if options.precision is not None:
        return [options.precision]
    possible = possible_precisions(artifact, backend)
    written = {part.spec.precision for part in artifact.parts()}
    if "fp32" not in written:  # what can't be compared is not made less precise on our own account
        # of a file alone: None, for a float16 graph may have to run in float32
        return [precision for precision in possible if precision in written] if artifact.variants else [None]
    try:
        able = available_precisions(backend)
    except BackendError:  # not usable after all: opening it says why
        able = ()
    found = [precision for precision in possible if precision in written or precision.removeprefix("int8+") in able]
    untried = {precision: why_untried(backend, precision, options) for precision in found}
    others += filter(None, untried.values())
    return [precision for precision in found if not untried[precision]]


def _open(candidates: Candidates, artifact: Artifact, backend: str, options: EngineOptions) -> None:
    try:
        engine = open_engine(artifact, backend, options)
    except (BackendError, ConfigError, ArtifactError) as exc:
        if isinstance(exc, ArtifactError) and options.precision in (None, artifact.spec.precision):
            raise  # the model itself, not a variant
        if str(exc) not in candidates.others:
            candidates.others.append(str(exc))
    else:
        precision = options.precision or engine.precision
        candidates.found.append(
            Candidate(backend=backend, precision=precision, sampling=engine.sampling, engine=engine)
        )
        note = sampling_note(engine)
        if note and note not in candidates.others:
            candidates.others.append(note)


def sampling_note(engine: Engine) -> str:
    """What is to be said of how an engine samples; empty where there is nothing."""
    return f"{engine.backend} samples {engine.sampling}: {engine.sampling_note}" if engine.sampling_note else ""


def _open_reference(artifact: Artifact, options: EngineOptions) -> Engine | None:
    for backend in BACKENDS:
        if backend in usable_here(artifact, []):
            for sampling in ("portable", None):  # None: as a file is written that is neither fused nor portable
                with contextlib.suppress(DdsmError):
                    wanted = dataclasses.replace(options, precision="fp32", sampling=sampling)
                    return open_engine(artifact, backend, wanted)
    return None
