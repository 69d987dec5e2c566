"""What was measured on this machine and decided, kept in the user's cache so that the next opening is quick.

A decision is one JSON file, named by the hash of all that it depends on: the bytes of the model's files, the versions
of this package and of the runtimes, processor and GPU, and what was asked for. If any of that changes, it is not found,
and the choice is measured anew. A file that is damaged or not ours is ignored; a folder that can't be written is no
error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact
from ddsm_deploy.bundlefile import describe
from ddsm_deploy.cache import cache_folder
from ddsm_deploy.engines import BACKENDS, EngineOptions, in_words, usable_backends
from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.spec import sha256_of

FORMAT = 1

GOALS = ("latency", "throughput")

CHOSEN, SLOWER, PASSED_OVER = "chosen", "slower", "passed over"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate, and what became of it.

    Attributes:
        backend: of `ddsm_deploy.engines.BACKENDS`.
        precision: asked for.
        options: other options of the engine that were tried here, beyond what the caller asked for.
        sampling: how dynamic sampling really ran; see `ddsm_deploy.engines.Engine`.
        ms: median time of an inference, milliseconds; None where it was not timed.
        changed: per cent of the pixels whose class differs from the reference's; None where it was not compared.
        allowed: most per cent that may.
        verdict: ``chosen``, ``slower`` or ``passed over``.
        reason: why passed over, or what else there is to say.
    """

    backend: str
    precision: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: str = "portable"
    ms: float | None = None
    changed: float | None = None
    allowed: float | None = None
    verdict: str = SLOWER
    reason: str = ""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS or self.verdict not in (CHOSEN, SLOWER, PASSED_OVER):
            raise ConfigError(f"no trial: backend {self.backend!r}, verdict {self.verdict!r}")
        numbers = (self.ms, self.changed, self.allowed)
        if any(number is not None and not _is_number(number) for number in numbers):
            raise ConfigError(f"no trial: its figures are {numbers}")
        if (self.changed is not None and self.allowed is None) or not isinstance(self.reason, str):
            raise ConfigError(f"no trial: {self.changed} % changed of {self.allowed}, {self.reason!r}")
        if not isinstance(self.sampling, str):
            raise ConfigError(f"no trial: sampling {self.sampling!r}")
        self.applied(EngineOptions())  # checks them

    def applied(self, base: EngineOptions) -> EngineOptions:
        """The engine's options: the caller's, and this candidate's own."""
        try:
            return dataclasses.replace(base, precision=self.precision, **self.options)
        except TypeError as exc:
            raise ConfigError(f"no trial: options {self.options!r}") from exc

    def label(self) -> str:
        """Backend, precision, sampling where it is not the usual one, and options in words."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        return " ".join([in_words(self.backend, self.precision, self.sampling), *options])

    def text(self) -> str:
        """One phrase with its figures."""
        figures = [] if self.ms is None else [f"{self.ms:.1f} ms"]
        if self.verdict == CHOSEN:
            figures += [] if self.changed is None else [f"{self.changed:.2f} % of the pixels unlike fp32's"]
            return f"{self.label()} ({', '.join(figures)})"
        if self.verdict == SLOWER:
            return f"{self.label()} {self.reason or 'slower'} ({', '.join(figures)})"
        return f"{self.label()} passed over: {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Which candidate runs, with every figure and every reason.

    Attributes:
        facts: what it depends on; see `facts_of`.
        trials: every candidate; one is chosen.
        others: reasons why further backends were no candidates, a phrase each.
        frames: what it was measured and compared on, in words.
        noise: per cent of the reference's pixels that noise in the frames changes; see `gate`. None without a gate.
        reference: what the candidates were compared with; empty where nothing could be.
        measured: when, UTC, ISO 8601.
        tuned: whether `ddsm tune` made it.
    """

    facts: Mapping[str, Any]
    trials: tuple[Trial, ...]
    others: tuple[str, ...] = ()
    frames: str = ""
    noise: float | None = None
    reference: str = ""
    measured: str = ""
    tuned: bool = False

    def __post_init__(self) -> None:
        texts = (self.frames, self.reference, self.measured, *self.others)
        if not isinstance(self.facts, dict) or not all(isinstance(text, str) for text in texts):
            raise ConfigError("no decision: its facts or its texts are of another type")
        if self.noise is not None and not _is_number(self.noise):
            raise ConfigError(f"no decision: the noise changes {self.noise!r} %")
        if sum(trial.verdict == CHOSEN for trial in self.trials) != 1:
            raise ConfigError("no decision: not exactly one candidate is chosen")

    @property
    def chosen(self) -> Trial:
        """The candidate that runs."""
        return next(trial for trial in self.trials if trial.verdict == CHOSEN)

    def text(self, *, now: bool) -> str:
        """Which, why, and when it was measured; then the others, the nearest first, each with its best options."""
        how = "tuned" if self.tuned else "measured"
        when = f"{how} now" if now else f"{how} earlier ({self.measured})"
        ranked = sorted(self.trials, key=lambda t: (t.verdict, t.ms is None, t.ms))
        ranked.sort(key=lambda t: (CHOSEN, SLOWER, PASSED_OVER).index(t.verdict))
        shown = {(trial.backend, trial.precision): trial for trial in reversed(ranked)}
        texts = [trial.text() for trial in ranked if trial in shown.values()]
        return "; ".join([f"{texts[0]}, {when}", *texts[1:], *self.others])

    def to_json(self) -> str:
        """The decision as JSON text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Decision:
        """Reads `to_json`'s text.

        Raises:
            ValueError: it is none.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != FORMAT:
                raise ValueError("of another format")
            fields["trials"] = tuple(Trial(**trial) for trial in fields["trials"])
            fields["others"] = tuple(fields["others"])
            return cls(**fields)
        except (RecursionError, TypeError, KeyError, AttributeError, ConfigError) as exc:
            raise ValueError(f"not a decision ({exc})") from exc


def facts_of(
    artifact: Artifact,
    options: EngineOptions,
    *,
    size: tuple[int, int] | None = None,
    goal: str = "latency",
    frames: str = "",
) -> dict[str, Any]:
    """All that a decision depends on, as JSON values.

    Args:
        artifact: the model; every file of it is hashed.
        options: what every candidate must be able to do. Which outputs are wanted is left out.
        size: height and width, where the model leaves them open.
        goal: of `GOALS`.
        frames: digest of the frames to compare on; empty for the package's own.
    """
    wanted = dataclasses.asdict(options)
    del wanted["outputs"]
    parts = {}
    for part in artifact.parts():
        ((kind, path),) = part.files.items()
        parts[describe(kind, part.spec.precision, part.target)] = model_sha256(path)
    facts = {
        "model": parts,
        "options": wanted,
        "size": size,
        "goal": goal,
        "frames": frames,
        "versions": {"ddsm-deploy": _own_version(), "kernels": _kernels()}
        | {status.backend: status.version for status in usable_backends() if status.available},
        "machine": _machine(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))  # as it will be read again: tuples are lists there
    return plain


def place_of(facts: Mapping[str, Any]) -> Path:
    """The file in which the decision on these facts is kept, whether it is there or not."""
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "decisions" / f"{name}.json"


def recall(facts: Mapping[str, Any]) -> Decision | None:
    """The kept decision on these facts; None where there is none, or no readable one."""
    try:
        decision = Decision.from_json(place_of(facts).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return decision if decision.facts == facts else None


def kept_for(artifact: Artifact) -> list[Decision]:
    """Every decision that is kept on a model, for this machine as it is, whatever was asked for; the newest first."""
    wanted = facts_of(artifact, EngineOptions())
    found = []
    for path in sorted(place_of({}).parent.glob("*.json")):
        try:
            decision = Decision.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        same = all(decision.facts.get(key) == wanted[key] for key in ("model", "versions", "machine"))
        if same and place_of(decision.facts) == path:
            found.append(decision)
    return sorted(found, key=lambda decision: decision.measured, reverse=True)


def keep(decision: Decision) -> Path | None:
    """Writes a decision for later; returns the file, or None where it can't be written."""
    path = place_of(decision.facts)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(decision.to_json(), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return None
    return path


def now() -> str:
    """The time as a decision states it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _own_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("ddsm-deploy")


def _kernels() -> str:
    """Which fused kernels can be used: instruction sets, and hashes of the libraries; empty where there are none."""
    status = kernels.status()
    if status.path is None:
        return ""
    libraries = [status.path]
    with contextlib.suppress(BackendError):
        libraries.append(kernels.pool_path())
    return " ".join([*status.instruction_sets, *(sha256_of(path)[:16] for path in libraries)])


def _machine() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = (re.search(r"^Model:\s*(.+)$", _read(str(path)), re.MULTILINE) for path in gpus)
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "flags": hashlib.sha256(flags[1].encode()).hexdigest()[:16] if flags else "",
        "cores": usable_cores(),
        "gpus": [found[1].strip() for found in names if found],
        "driver": _read("/proc/driver/nvidia/version").partition("\n")[0],
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
