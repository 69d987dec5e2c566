"""``backend="auto"``: the quickest way to run a model here that is still right, found by a short measurement, and why.

Candidates are the model's files × the backends that are usable × what each computes in. Each is compared with the
float32 reference on a few frames (see `gate`) and timed; the fastest that passes wins. The decision is kept (see
`decisions`), so that later openings measure nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import Engine, EngineOptions, in_words, open_engine, select
from ddsm_deploy.errors import BackendError, ConfigError, DdsmError, GateError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.candidates import (
    NOT_COMPARED,
    Candidate,
    Candidates,
    fixed_size,
    judge,
    open_candidates,
    sampling_note,
    time_all,
)
from ddsm_deploy.runtime.decisions import CHOSEN, Decision, facts_of, keep, now, recall
from ddsm_deploy.runtime.gate import Frames, Gate, frames_for
from ddsm_deploy.spec import PRECISIONS

NEAR = 1.05
"""A candidate this much slower than the fastest still wins if it is more precise: a timing of seconds can't tell them
apart, and the choice should not."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """An open engine, and why it is this one.

    Attributes:
        engine: what runs.
        part: the model, or the variant of it, whose file runs.
        options: with which it was opened.
        reason: who chose it, and why, in one line.
        decision: every figure; None where nothing was measured.
    """

    engine: Engine
    part: Artifact
    options: EngineOptions
    reason: str
    decision: Decision | None = None


def open_named(artifact: Artifact, backend: str, options: EngineOptions, reason: str = "") -> Choice:
    """Opens the backend that was asked for.

    Raises:
        DdsmError: as `open_engine`.
    """
    engine = open_engine(artifact, backend, options)
    part = select(artifact, backend, options.precision)
    if not reason:
        note = sampling_note(engine)
        reason = "; ".join([f"{backend}, as asked for", *([note] if note else [])])
    return Choice(engine, part, options, reason)


def open_decided(artifact: Artifact, decision: Decision, options: EngineOptions) -> Choice:
    """Opens what an earlier decision chose.

    Raises:
        DdsmError: it can't be opened any more.
    """
    chosen = decision.chosen
    choice = open_named(artifact, chosen.backend, chosen.applied(options), decision.text(now=False))
    return dataclasses.replace(choice, decision=decision)


def choose(
    artifact: Artifact,
    options: EngineOptions,
    *,
    size: tuple[int, int] | None = None,
    images: Sequence[Image] | None = None,
    fresh: bool = False,
) -> Choice:
    """Opens the candidate that an earlier measurement chose, or measures all and keeps the decision.

    torch is opened only where nothing else can run: it takes seconds to load, and eager inference has never been the
    quickest way.

    Args:
        artifact: the model.
        options: what every candidate must be able to do. Its precision, if given, is the only one tried.
        size: height and width to measure at, where the model leaves them open; None is the spec's size.
        images: what to compare and to time on, uint8 H×W×3, BGR; None is the package's own frames.
        fresh: measure, whatever is kept.

    Raises:
        BackendError: no backend can do what was asked; the message says why for each.
        GateError: what was asked for runs, but gives masks too far from float32's.
        ArtifactError: the model's file is damaged.
        ConfigError: the model is fixed to another size.
    """
    if "endpoint" in artifact.files:
        return open_named(artifact, "triton", options, "triton, where the model is served")
    frames = frames_for(artifact.spec, images, size or (artifact.spec.height, artifact.spec.width))
    facts = facts_of(artifact, options, size=size, frames=frames.digest)
    questions = [facts]
    if set(options.outputs or ("mask",)) != {"mask"}:  # which some of the files may lack: a question of its own
        questions.append({**facts, "outputs": sorted(options.outputs or ())})
    for facts in questions:
        kept = None if fresh else recall(facts)
        if kept is not None:
            with contextlib.suppress(DdsmError):  # what ran then no longer does, or lacks an output
                return open_decided(artifact, kept, options)
    with open_candidates(artifact, options) as candidates:
        if not candidates.found:
            return _open_torch(artifact, options, candidates.others)
        if "checkpoint" in artifact.files:
            candidates.others.append("torch not tried (eager, and slow to load)")
        first = candidates.found[0]
        if len(candidates.found) == 1 and candidates.reference in (first.engine, None):
            return _take(first, artifact, options, _only(candidates))
        assert first.engine is not None
        fixed_size(first.engine, artifact, size)  # raises where it can't run at that size
        gate = judge(candidates, frames, artifact.spec)
        time_all(candidates.found, frames)
        best = pick(candidates.found, artifact.name)
        decision = decide(candidates, best, facts=facts, frames=frames, gate=gate)
        keep(decision)
        choice = _take(best, artifact, options, decision.text(now=True))
    return dataclasses.replace(choice, decision=decision)


def pick(found: Sequence[Candidate], name: str) -> Candidate:
    """The fastest that passed; of those that are within `NEAR` of it, the most precise.

    Raises:
        GateError: none passed.
    """
    passed = [candidate for candidate in found if not candidate.objection and candidate.ms is not None]
    if not passed:
        why = "; ".join(f"{one.trial().label()}: {one.objection}" for one in found)
        raise GateError(f"no backend gives what {name} gives in fp32: {why}; name a backend to run it all the same")
    fastest = min(candidate.ms or 0.0 for candidate in passed)
    near = [candidate for candidate in passed if (candidate.ms or 0.0) <= NEAR * fastest]
    return min(near, key=lambda one: (PRECISIONS.index(one.precision), one.ms))


def decide(
    candidates: Candidates, best: Candidate, *, facts: dict[str, object], frames: Frames, gate: Gate | None
) -> Decision:
    """The record of a choice."""
    reference = candidates.reference
    faster = [one for one in candidates.found if (one.ms or 0.0) < (best.ms or 0.0)]
    trials = tuple(
        one.trial(CHOSEN)
        if one is best
        else one.trial(reason=f"not {NEAR - 1:.0%} quicker and less precise" if one in faster else "")
        for one in candidates.found
    )
    return Decision(
        facts=facts,
        trials=trials,
        others=(*candidates.others, *([NOT_COMPARED] if gate is None else [])),
        frames=frames.source,
        noise=None if gate is None else gate.noise,
        reference="" if reference is None else in_words(reference.backend, reference.precision, reference.sampling),
        measured=now(),
    )


def _take(candidate: Candidate, artifact: Artifact, options: EngineOptions, reason: str) -> Choice:
    """A candidate's engine, which from now on is the caller's to close."""
    engine, candidate.engine = candidate.engine, None
    assert engine is not None
    options = candidate.trial().applied(options)
    return Choice(engine, select(artifact, candidate.backend, options.precision), options, reason)


def _only(candidates: Candidates) -> str:
    label = candidates.found[0].trial().label()
    compared = [] if candidates.reference is not None else [NOT_COMPARED]
    return "; ".join([f"{label}, the only one that can run this", *candidates.others, *compared])


def _open_torch(artifact: Artifact, options: EngineOptions, others: Sequence[str]) -> Choice:
    try:
        if "checkpoint" not in artifact.files:
            raise BackendError("torch needs the model's checkpoint file, which is not there")
        choice = open_named(artifact, "torch", options)
    except (BackendError, ConfigError) as exc:
        raise BackendError(f"no backend can run {artifact.name}: {'; '.join([*others, str(exc)])}") from exc
    reason = f"{in_words('torch', choice.engine.precision, choice.engine.sampling)}, the only one that can run this"
    return dataclasses.replace(choice, reason="; ".join([reason, *others]))
