"""Pass or fail of a paced run, on JSON made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.evaluate.baseline import Baseline, Gate, judge

SETTINGS = {"model": "m", "precision": "fp32", "rate": 30, "backend": "openvino", "deadline_ms": 40}
MACHINE = {"cpu": "A", "cores_usable": 2, "load_average": [0.1], "versions": {"numpy": "2.0", "openvino": "2026.4"}}


def run(**changes: Any) -> dict[str, Any]:
    good = {"settings": SETTINGS, "machine": MACHINE, "p50_ms": 10.0, "p99_ms": 20.0, "frames": 100}
    return good | {"deadline_misses": 0, "dropped": 0, "reordered": 0, "mixed_up": 0} | changes


@pytest.fixture
def baseline(tmp_path: Path) -> Baseline:
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(run()), encoding="utf-8")
    return Baseline(path)


def test_as_before_passes(baseline: Baseline) -> None:
    verdict = judge(Gate(), run(), baseline)
    assert verdict
    assert (verdict.failures, verdict.warnings) == ((), ())
    assert len(verdict.checks) == 5


@pytest.mark.parametrize(
    ("changes", "gate", "failures"),
    [
        ({"p50_ms": 11.0, "p99_ms": 22.0}, Gate(), []),  # 10 % to the digit
        ({"p50_ms": 11.01}, Gate(), ["p50: 11.01 ms, baseline 10.00 ms (+10.1 %); allowed +10 %"]),
        ({"p99_ms": 20.5}, Gate(max_slower=2), ["p99: 20.50 ms, baseline 20.00 ms (+2.5 %); allowed +2 %"]),
        ({"p50_ms": 1.0, "p99_ms": 2.0}, Gate(max_slower=0), []),
        (
            {"deadline_misses": 2, "dropped": 1},
            Gate(max_misses=2),
            ["frames without a mask in time: 3 (2 late, 1 dropped of 100); allowed 2"],
        ),
        ({"deadline_misses": 2, "dropped": 1}, Gate(max_misses=3), []),
        ({"reordered": 1}, Gate(max_misses=9), ["masks out of order: 1; allowed 0"]),
        ({"mixed_up": 4}, Gate(max_misses=9), ["masks that are not their frame's: 4; allowed 0"]),
        (
            {"p50_ms": None, "p99_ms": None, "dropped": 100},
            Gate(),
            [
                "p50: no frame got a mask",
                "p99: no frame got a mask",
                "frames without a mask in time: 100 (0 late, 100 dropped of 100); allowed 0",
            ],
        ),
    ],
)
def test_figures(baseline: Baseline, changes: dict[str, Any], gate: Gate, failures: list[str]) -> None:
    verdict = judge(gate, run(**changes), baseline)
    assert list(verdict.failures) == failures
    assert bool(verdict) is not bool(failures)
    assert json.loads(json.dumps(verdict.fields()))["passed"] is not bool(failures)


def test_without_a_baseline_the_frames_alone_are_judged() -> None:
    assert judge(Gate(), run(p50_ms=1e9, p99_ms=1e9), None)
    assert not judge(Gate(), run(dropped=1), None)


@pytest.mark.parametrize(("key", "value"), [("model", "n"), ("precision", "int8"), ("rate", 25)])
def test_another_run_is_refused(baseline: Baseline, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"is of another run: {key} {SETTINGS[key]}, here {value}; "):
        baseline.check_settings({**SETTINGS, key: value})


def test_other_settings_and_machines_are_warned_of(baseline: Baseline) -> None:
    settings = {**SETTINGS, "backend": "onnxruntime", "deadline_ms": 33, "load": 2}
    baseline.check_settings(settings)  # comparable
    versions = {"numpy": "2.0", "openvino": "2026.5", "torch": "2.14"}
    machine = {**MACHINE, "cpu": "B", "load_average": [9.0], "versions": versions}
    assert judge(Gate(), run(settings=settings, machine=machine), baseline).warnings == (
        "the baseline ran with other settings: backend openvino, here onnxruntime",
        "the baseline ran with other settings: deadline_ms 40, here 33",
        "the baseline ran with other settings: load not told, here 2",
        "the baseline is of another machine: cpu A, here B",
        "the baseline is of another machine: openvino 2026.4, here 2026.5",
        "the baseline is of another machine: torch not told, here 2.14",
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't be read"),
        ("{", "no JSON"),
        ("[]", "no result to compare with"),
        ("{}", "no result to compare with"),
        (json.dumps(run(interrupted=True)), "of a run that was interrupted"),
        (json.dumps(run(p50_ms=None)), "no result to compare with"),
        (json.dumps(run(p99_ms=0)), "no result to compare with"),
        (json.dumps({"rows": [], "machine": MACHINE}), "no result to compare with"),  # of `ddsm bench` without --rate
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "b.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=f"b.json: {words}"):
        Baseline(path)


@pytest.mark.parametrize("wrong", [{"max_slower": -1}, {"max_slower": float("nan")}, {"max_misses": -1}])
def test_wrong_gates(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max-"):
        Gate(**wrong)
