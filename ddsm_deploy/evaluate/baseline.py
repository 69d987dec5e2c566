"""Pass or fail of a paced run: by an earlier run's JSON, and by the frames that got no mask in time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import ConfigError, InputError

FIGURES = ("p50_ms", "p99_ms")
"""What is compared with the baseline."""

_DECISIVE = ("model", "precision", "rate")
"""Settings that must be the baseline's; where another one differs the comparison is made, with a warning."""

_MACHINE = ("cpu", "architecture", "cores_usable", "python", "versions")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """What a paced run must keep to.

    Attributes:
        baseline: JSON of an earlier run; None judges the frames alone.
        max_slower: per cent by which p50 and p99 may lie above the baseline's.
        max_misses: frames, late or dropped, that may go without a mask in time.
    """

    baseline: Path | None = None
    max_slower: float = 10.0
    max_misses: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.max_slower < math.inf:
            raise ConfigError(f"max-slower is {self.max_slower} %; expected 0 or more")
        if self.max_misses < 0:
            raise ConfigError(f"max-misses is {self.max_misses}; expected 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One figure that was judged: whether it holds, and the figure in words."""

    passed: bool
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """Truthy where every figure holds.

    Attributes:
        checks: what was judged.
        warnings: why the baseline may not be comparable.
    """

    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[str, ...]:
        """The figures that do not hold, in words."""
        return tuple(check.text for check in self.checks if not check.passed)

    def fields(self) -> dict[str, Any]:
        """The verdict as JSON values."""
        return {"passed": bool(self), **dataclasses.asdict(self)}


class Baseline:
    """The JSON of an earlier run.

    Raises:
        InputError: the file can't be read, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise InputError(f"{path}: can't be read ({exc.strerror or exc})") from exc
        except ValueError as exc:
            raise InputError(f"{path}: no JSON ({exc}); expected a file of ddsm bench --rate … --json") from exc
        try:
            self.settings: dict[str, Any] = dict(fields["settings"])
            self.machine: dict[str, Any] = dict(fields["machine"])
            self.figures = {key: float(fields[key]) for key in FIGURES}
            usable = all(0 < value < math.inf for value in self.figures.values())
        except (KeyError, TypeError, ValueError):
            usable = False
        if usable and fields.get("interrupted"):
            raise InputError(f"{path}: of a run that was interrupted; expected one that ran to its end")
        if not usable:
            raise InputError(f"{path}: no result to compare with; expected a file of ddsm bench --rate … --json")
        self._path = path

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuses to compare what is not the same thing.

        Raises:
            ConfigError: model, precision or rate are not the baseline's.
        """
        if changed := _changes(self.settings, settings, _DECISIVE):
            raise ConfigError(
                f"{self._path} is of another run: {'; '.join(changed)}; name what it ran with, or record a new baseline"
            )

    def warnings(self, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> tuple[str, ...]:
        """What else differs, a line each."""
        others = [key for key in settings if key not in _DECISIVE]
        lines = [f"the baseline ran with other settings: {text}" for text in _changes(self.settings, settings, others)]
        lines += [f"the baseline is of another machine: {text}" for text in _changes(self.machine, machine, _MACHINE)]
        return tuple(lines)


def judge(gate: Gate, fields: Mapping[str, Any], baseline: Baseline | None) -> Verdict:
    """Judges a result.

    Args:
        gate: what is allowed.
        fields: of the result, see `paced.PacedResult.fields`.
        baseline: what its figures are compared with, if anything.
    """
    before = baseline.figures if baseline else {}
    checks = [_compared(key, fields[key], value, gate.max_slower) for key, value in before.items()]
    late, dropped = fields["deadline_misses"], fields["dropped"]
    counts = f"{late} late, {dropped} dropped of {fields['frames']}"
    checks.append(
        Check(
            passed=late + dropped <= gate.max_misses,
            text=f"frames without a mask in time: {late + dropped} ({counts}); allowed {gate.max_misses}",
        )
    )
    for key, what in (("reordered", "masks out of order"), ("mixed_up", "masks that are not their frame's")):
        checks.append(Check(passed=not fields[key], text=f"{what}: {fields[key]}; allowed 0"))
    warnings = baseline.warnings(fields["settings"], fields["machine"]) if baseline else ()
    return Verdict(checks=tuple(checks), warnings=warnings)


def _compared(key: str, now: float | None, before: float, allowed: float) -> Check:
    name = key.removesuffix("_ms")
    if now is None:
        return Check(passed=False, text=f"{name}: no frame got a mask")
    change = 100 * (now / before - 1)
    text = f"{name}: {now:.2f} ms, baseline {before:.2f} ms ({change:+.1f} %); allowed +{allowed:g} %"
    return Check(passed=now <= before * (1 + allowed / 100), text=text)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], keys: tuple[str, ...] | list[str]) -> list[str]:
    changed = []
    for key in keys:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            changed += [f"{name} {_word(old.get(name))}, here {_word(new.get(name))}" for name in names]
        elif old != new:
            changed.append(f"{key} {_word(old)}, here {_word(new)}")
    return changed


def _word(value: object) -> str:
    return "not told" if value is None else str(value)
