"""Kept decisions: found again for the same question, never for another, and never trusted when damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from colour_graph import write_colour_model

from ddsm_deploy import kernels
from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import ConfigError
from ddsm_deploy.runtime.decisions import (
    CHOSEN,
    PASSED_OVER,
    Decision,
    Trial,
    facts_of,
    keep,
    kept_for,
    place_of,
    recall,
)
from ddsm_deploy.spec import sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decision(tmp_path: Path) -> Decision:
    artifact = resolve(write_colour_model(tmp_path / "model.onnx"))
    trials = (
        Trial(backend="onnxruntime", precision="fp32", ms=9.0, changed=0.0, allowed=1.0),
        Trial(backend="openvino", precision="bf16", ms=4.0, changed=0.5, allowed=1.0, verdict=CHOSEN),
        Trial(
            backend="openvino", precision="int8", ms=2.0, changed=9.0, allowed=3.0, verdict=PASSED_OVER, reason="wrong"
        ),
        Trial(backend="onnxruntime", precision="fp32", options={"threads": 1}, ms=12.0, changed=0.0, allowed=1.0),
    )
    return Decision(
        facts=facts_of(artifact, EngineOptions()), trials=trials, others=("torch not tried",), measured="2026-01-01"
    )


def test_it_is_kept_and_found_again(decision: Decision, tmp_path: Path) -> None:
    assert recall(decision.facts) is None
    path = keep(decision)
    assert path == place_of(decision.facts)
    assert recall(decision.facts) == decision
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert kept_for(resolve(tmp_path / "model.onnx")) == [decision]


def test_it_says_which_and_why(decision: Decision) -> None:
    others = ["onnxruntime fp32 slower (9.0 ms)", "openvino int8 passed over: wrong", "torch not tried"]
    chosen = "openvino bf16 (4.0 ms, 0.50 % of the pixels unlike fp32's)"
    assert decision.text(now=True).split("; ") == [f"{chosen}, measured now", *others]
    tuned = dataclasses.replace(decision, tuned=True)
    assert tuned.text(now=False).split("; ") == [f"{chosen}, tuned earlier (2026-01-01)", *others]


def test_another_question_has_another_answer(decision: Decision, tmp_path: Path) -> None:
    keep(decision)
    artifact = resolve(tmp_path / "model.onnx")
    asked = [
        facts_of(artifact, EngineOptions(threads=1)),
        facts_of(artifact, EngineOptions(precision="fp32")),
        facts_of(artifact, EngineOptions(), goal="throughput"),
        facts_of(artifact, EngineOptions(), size=(8, 12)),
        facts_of(artifact, EngineOptions(), frames="0" * 64),
        facts_of(resolve(write_colour_model(tmp_path / "model.onnx", confidence=True)), EngineOptions()),
        {**decision.facts, "versions": {}},
        {**decision.facts, "machine": {}},
    ]
    assert [recall(facts) for facts in asked] == [None] * len(asked)
    assert len({place_of(facts) for facts in asked}) == len(asked)


def test_how_the_winner_samples_is_said_and_kept(decision: Decision) -> None:
    trials = tuple(dataclasses.replace(trial, sampling="fused") for trial in decision.trials)
    fused = dataclasses.replace(decision, trials=trials)
    assert fused.text(now=True).startswith("openvino bf16 fused (4.0 ms")
    assert trials[3].label() == "onnxruntime fp32 fused threads=1"
    keep(fused)
    kept = recall(fused.facts)
    assert kept is not None
    assert kept.chosen.sampling == "fused"


def test_the_kernels_are_part_of_the_question(
    decision: Decision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing
) -> None:
    status = kernels.status()
    if status.path is None:
        missing("kernels", status.reason)
    keep(decision)
    artifact = resolve(tmp_path / "model.onnx")
    there = facts_of(artifact, EngineOptions())["versions"]["kernels"]
    assert there.startswith(f"{' '.join(status.instruction_sets)} {sha256_of(status.path)[:16]}")
    (tmp_path / "no kernels").mkdir()
    monkeypatch.setattr(kernels, "_FOLDER", tmp_path / "no kernels")
    kernels._library.cache_clear()
    try:
        without = facts_of(artifact, EngineOptions())
    finally:
        kernels._library.cache_clear()
    assert without["versions"]["kernels"] == ""
    assert recall(without) is None


def test_outputs_make_no_other_question(tmp_path: Path) -> None:
    artifact = resolve(write_colour_model(tmp_path / "model.onnx"))
    assert facts_of(artifact, EngineOptions(outputs=("mask",))) == facts_of(artifact, EngineOptions())


@pytest.mark.parametrize(
    "harm",
    [
        lambda d: d.update(format=2),
        lambda d: d.pop("trials"),
        lambda d: d["facts"].update(goal="throughput"),
        lambda d: d["trials"].clear(),
        lambda d: d["trials"][0].update(verdict="chosen"),
        lambda d: d["trials"][1].update(backend="../evil"),
        lambda d: d["trials"][1].update(precision="fp8"),
        lambda d: d["trials"][1].update(options={"threads": "many"}),
        lambda d: d["trials"][1].update(options={"command": "rm"}),
        lambda d: d["trials"][1].update(options=7),
        lambda d: d["trials"][1].update(ms="fast"),
        lambda d: d["trials"][1].update(ms=float("nan")),
        lambda d: d["trials"][1].update(ms=None, allowed="much"),
        lambda d: d["trials"][0].update(reason=7),
        lambda d: d["trials"][0].update(sampling=7),
        lambda d: d["trials"][0].update(extra=1),
        lambda d: d.update(facts=[]),
        lambda d: d.update(measured=7),
        lambda d: d.update(noise="little"),
        lambda d: d.update(others=7),
        lambda d: d.update(surprise=1),
    ],
)
def test_an_altered_file_is_ignored_and_rewritten(decision: Decision, harm) -> None:
    path = keep(decision)
    assert path is not None
    fields = json.loads(path.read_text())
    harm(fields)
    path.write_text(json.dumps(fields))
    assert recall(decision.facts) is None
    keep(decision)
    assert recall(decision.facts) == decision


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_is_ignored(decision: Decision, tmp_path: Path, content: bytes) -> None:
    path = keep(decision)
    assert path is not None
    path.write_bytes(content)
    assert recall(decision.facts) is None
    assert kept_for(resolve(tmp_path / "model.onnx")) == []


def test_a_cache_that_cannot_be_written_is_no_error(
    decision: Decision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keep(decision) is None
    assert recall(decision.facts) is None


def test_exactly_one_is_chosen(decision: Decision) -> None:
    for trials in ((), decision.trials[:1], (decision.trials[1],) * 2):
        with pytest.raises(ConfigError, match="not exactly one candidate is chosen"):
            dataclasses.replace(decision, trials=trials)
