"""The automatic choice on real runtimes: what it tries, what it refuses, what it keeps, and what it finds again."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from colour_graph import write_colour_model
from onnx import helper, numpy_helper

from ddsm_deploy import kernels
from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, available_precisions
from ddsm_deploy.errors import BackendError, ConfigError, GateError
from ddsm_deploy.export.onnxgraph import load_graph, save_graph, set_metadata
from ddsm_deploy.onnxweights import model_sha256
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.runtime.candidates import Candidate
from ddsm_deploy.runtime.choice import pick
from ddsm_deploy.runtime.decisions import CHOSEN, PASSED_OVER, Decision, Trial, facts_of, keep, place_of, recall
from ddsm_deploy.runtime.pipeline import identity_of, open_for_batch
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import METADATA_KEY


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def swapped(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network that takes red for blue, under the label of an INT8 file for ONNX Runtime."""
    model = load_graph(tiny_onnx)
    graph = model.graph
    for node in graph.node:
        node.input[:] = ["swapped" if name == "image" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Gather", ["image", "order"], ["swapped"], axis=3))
    graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
    onnx.checker.check_model(model)
    spec = resolve(tiny_onnx).spec.replace(precision="int8").with_provenance(target="onnxruntime")
    path = tmp_path_factory.mktemp("swapped") / "swapped.onnx"
    save_graph(model, path, spec)
    return path


def by_label(decision: Decision | None) -> dict[tuple[str, str], Trial]:
    assert decision is not None
    return {(trial.backend, trial.precision): trial for trial in decision.trials}


def test_every_form_is_tried_and_the_fastest_that_passes_runs(tiny_bundle: Path) -> None:
    with Segmenter.open(tiny_bundle) as segmenter:
        trials = by_label(segmenter.decision)
        expected = {(backend, p) for backend in ("onnxruntime", "openvino") for p in ("fp32", "int8")}
        if "bf16" in available_precisions("openvino"):
            expected |= {("openvino", "bf16"), ("openvino", "int8+bf16")}
        assert expected <= trials.keys()
        assert all(trial.ms and trial.changed is not None and trial.allowed for trial in trials.values())
        chosen = trials[segmenter.backend, segmenter.precision]
        assert chosen.verdict == CHOSEN
        assert chosen.changed <= chosen.allowed
        passed = [trial for trial in trials.values() if trial.verdict != PASSED_OVER]
        assert chosen.ms <= 1.05 * min(trial.ms for trial in passed)
        assert trials["onnxruntime", "fp32"].changed == 0  # the reference, compared with itself
        assert segmenter.choice.startswith(f"{chosen.label()} ({chosen.ms:.1f} ms")
        assert "torch not tried" in segmenter.choice
        assert segmenter.file is not None
        stated = {"fp32": "fp32", "bf16": "fp32", "int8+bf16": "int8"}.get(segmenter.precision, segmenter.precision)
        assert resolve(segmenter.file).spec.precision == stated


def test_float16_that_is_float32_underneath_is_not_tried_unasked(tiny_bundle: Path) -> None:
    """On x86 ONNX Runtime has no float16 arithmetic: it converts to float32 and back around every operator."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    with Segmenter.open(tiny_bundle) as segmenter:
        assert (("onnxruntime", "fp16") in by_label(segmenter.decision)) != on_x86
        assert ("onnxruntime fp16 not tried (on x86 " in segmenter.choice) == on_x86
    with Segmenter.open(tiny_bundle, precision="fp16") as segmenter:  # asked for
        assert ("onnxruntime", "fp16") in by_label(segmenter.decision)
        assert "not tried (on x86" not in segmenter.choice


def test_a_fused_file_is_judged_beside_standard_operators(tiny_fused: Path, need, missing) -> None:
    need("openvino")
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    with Segmenter.open(tiny_fused) as segmenter:
        assert segmenter.sampling == "fused"
        assert segmenter.decision is not None
        assert {trial.sampling for trial in segmenter.decision.trials} == {"fused"}
        assert all(trial.changed is not None and trial.changed <= 0.1 for trial in segmenter.decision.trials[:1])
        assert segmenter.decision.reference == "onnxruntime fp32"  # with no word of its own: standard operators
        label = f"{segmenter.backend} {segmenter.precision} fused"
        assert segmenter.choice.startswith(f"{label} (")
        assert (segmenter.label, label in repr(segmenter)) == (label, True)
    with Segmenter.open(tiny_fused) as again:
        assert (again.sampling, again.decision) == ("fused", segmenter.decision)
        assert "measured earlier" in again.choice
    with Segmenter.open(tiny_fused, options=EngineOptions(sampling="portable")) as other:
        assert other.sampling == "portable"
        assert {trial.sampling for trial in other.decision.trials} == {"portable"}  # type: ignore[union-attr]


def test_it_is_measured_once(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    with Segmenter.open(model) as first:
        assert ", measured now; " in first.choice
        assert first.decision is not None
        file = place_of(first.decision.facts)
        written = file.stat().st_mtime_ns
    with Segmenter.open(model) as second:
        assert f", measured earlier ({first.decision.measured}); " in second.choice
        assert (second.decision, second.file, second.options) == (first.decision, first.file, first.options)
    assert file.stat().st_mtime_ns == written
    with Segmenter.open(model, fresh=True) as third:
        assert ", measured now; " in third.choice
    assert file.stat().st_mtime_ns > written
    write_colour_model(model, confidence=True)
    with Segmenter.open(model) as fourth:
        assert ", measured now; " in fourth.choice


def test_a_wrong_variant_is_passed_over_however_fast(
    tiny_files: dict[str, Path], swapped: Path, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "b", [tiny_files["fp32"], swapped])
    with Segmenter.open(tmp_path / "b") as segmenter:
        assert segmenter.precision != "int8"
        wrong = by_label(segmenter.decision)["onnxruntime", "int8"]
        assert wrong.verdict == PASSED_OVER
        assert wrong.changed > wrong.allowed
        assert "of the pixels changed class, expected at most" in wrong.reason
        assert f"onnxruntime int8 passed over: {wrong.reason}" in segmenter.choice
    with pytest.raises(GateError, match=r"no backend gives what b gives in fp32: onnxruntime int8: .* % of the pixels"):
        Segmenter.open(tmp_path / "b", precision="int8")
    with Segmenter.open(tmp_path / "b", precision="int8", backend="onnxruntime") as segmenter:  # asked for by name
        assert segmenter.precision == "int8"


def test_a_variant_that_no_runtime_can_run_is_passed_over(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    model = load_graph(tiny_files["fp32"])
    model.graph.node[0].op_type = "NoSuchOperator"
    spec = resolve(tiny_files["fp32"]).spec.replace(precision="int8")
    set_metadata(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, tmp_path / "broken.onnx")
    make_bundle(tmp_path / "b", [tiny_files["fp32"], tmp_path / "broken.onnx"])
    with Segmenter.open(tmp_path / "b") as segmenter:
        assert segmenter.precision != "int8"
        assert "NoSuchOperator" in segmenter.choice


def test_a_precision_is_pinned(tiny_bundle: Path) -> None:
    with Segmenter.open(tiny_bundle, precision="fp32") as segmenter:
        assert segmenter.precision == "fp32"
        assert {trial.precision for trial in by_label(segmenter.decision).values()} == {"fp32"}
    with Segmenter.open(tiny_bundle, precision="int8") as segmenter:
        assert segmenter.precision == "int8"
        assert segmenter.decision is not None
        assert segmenter.decision.reference == "onnxruntime fp32"  # opened for the comparison alone


def test_without_a_float32_file_nothing_is_compared_and_that_is_said(
    tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    make_bundle(tmp_path / "b", [tiny_files["onnxruntime"], tiny_files["openvino"]])
    with Segmenter.open(tmp_path / "b") as segmenter:
        assert segmenter.precision == "int8"
        assert "not compared with fp32, which the model lacks here" in segmenter.choice
        trials = by_label(segmenter.decision)
        assert trials.keys() == {("onnxruntime", "int8"), ("openvino", "int8")}  # none is made less precise
        assert all(trial.changed is None and trial.ms for trial in trials.values())


def test_frames_of_the_callers_make_a_question_of_their_own(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    frames = [np.zeros((8, 12, 3), np.uint8), np.full((16, 24, 3), (200, 0, 0), np.uint8)]
    Segmenter.open(model).close()
    with Segmenter.open(model, frames=frames) as segmenter:
        assert ", measured now; " in segmenter.choice
        assert segmenter.decision is not None
        assert segmenter.decision.frames == "2 frames of the caller's"
    with Segmenter.open(model, frames=frames) as segmenter:
        assert ", measured earlier" in segmenter.choice


def test_a_size_that_the_model_cannot_run_at(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fixed to 8x12 and can't run at 32x32"):
        Segmenter.open(write_colour_model(tmp_path / "model.onnx"), size=(32, 32))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with Segmenter.open(write_colour_model(tmp_path / "model.onnx")) as segmenter:
        assert "measured now" in segmenter.choice


def decided(model: Path, trial: Trial, *, goal: str = "latency") -> Decision:
    """A decision as if it had been measured, kept."""
    facts = facts_of(resolve(model), EngineOptions(), goal=goal)
    decision = Decision(facts=facts, trials=(dataclasses.replace(trial, verdict=CHOSEN),), measured="then", tuned=True)
    assert keep(decision)
    return decision


def test_a_kept_decision_is_opened_with_its_options(tiny_bundle: Path) -> None:
    decided(tiny_bundle, Trial(backend="openvino", precision="int8", options={"threads": 1, "streams": 1}, ms=1.0))
    with Segmenter.open(tiny_bundle) as segmenter:
        assert (segmenter.backend, segmenter.precision) == ("openvino", "int8")
        assert segmenter.choice == "openvino int8 threads=1 streams=1 (1.0 ms), tuned earlier (then)"
        assert segmenter.options == EngineOptions(precision="int8", threads=1, streams=1)
        assert segmenter.file == tiny_bundle / "model.int8.openvino.onnx"


def test_a_kept_decision_that_no_longer_opens_is_measured_anew(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    decided(model, Trial(backend="onnxruntime", precision="fp32", options={"streams": 2}, ms=1.0))
    with Segmenter.open(model) as segmenter:
        assert "measured now" in segmenter.choice


def test_further_outputs_are_a_question_of_their_own(tmp_path: Path) -> None:
    """Files without them are no candidates then: nobody else may be told the answer."""
    model = write_colour_model(tmp_path / "model.onnx", confidence=True)
    wanted = EngineOptions(outputs=("mask", "confidence"))
    for fresh in (False, True):
        with Segmenter.open(model, options=wanted, fresh=fresh) as segmenter:
            assert "measured now" in segmenter.choice
    with Segmenter.open(model, options=wanted) as segmenter:
        assert "measured earlier" in segmenter.choice
    with Segmenter.open(model) as segmenter:
        assert "measured now" in segmenter.choice


def test_outputs_that_a_kept_decision_lacks_do_not_replace_it(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx", confidence=True)
    kept = decided(
        model, Trial(backend="onnxruntime", precision="fp32", options={"streams": 2}, ms=1.0)
    )  # not openable
    wanted = EngineOptions(outputs=("mask", "confidence"))
    with Segmenter.open(model, options=wanted) as segmenter:
        assert "measured now" in segmenter.choice
    with Segmenter.open(model, options=wanted) as segmenter:
        assert "measured earlier" in segmenter.choice
    assert recall(kept.facts) == kept


def test_a_batch_runs_what_was_tuned_for_throughput(tiny_bundle: Path) -> None:
    trial = Trial(backend="onnxruntime", precision="int8", options={"threads": 1, "spinning": False}, ms=1.0)
    decision = decided(tiny_bundle, trial, goal="throughput")
    with open_for_batch(tiny_bundle) as segmenter:
        assert (segmenter.backend, segmenter.precision, segmenter.decision) == ("onnxruntime", "int8", decision)
        assert segmenter.options == EngineOptions(precision="int8", threads=1, spinning=False, outputs=("mask",))
        assert identity_of(segmenter).sha256 == model_sha256(tiny_bundle / "model.int8.onnxruntime.onnx")
    with open_for_batch(tiny_bundle, precision="fp32") as segmenter:  # pinned
        assert segmenter.precision == "fp32"
        assert segmenter.decision != decision


def test_a_batch_runs_the_variant_that_was_chosen(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    """OpenVINO is opened a second time for a batch: that must not fall back to the model's own precision."""
    make_bundle(tmp_path / "b", [tiny_files["fp32"], tiny_files["openvino"]])
    facts = facts_of(resolve(tmp_path / "b"), EngineOptions(threads=1))
    trial = Trial(backend="openvino", precision="int8", ms=1.0, verdict=CHOSEN)
    keep(Decision(facts=facts, trials=(trial,), measured="then"))
    with open_for_batch(tmp_path / "b", workers=2) as first, open_for_batch(tmp_path / "b", workers=2) as second:
        assert (first.backend, first.precision) == ("openvino", "int8")
        assert first.options is not None
        assert (first.options.streams, first.options.hint) == (2, "throughput")
        assert identity_of(first) == identity_of(second)  # so that a run can be resumed
        assert identity_of(first).settings["precision"] == "int8"


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"fp32": 10.0, "bf16": 9.9, "int8": 9.6}, "fp32"),  # all within 5 % of the fastest
        ({"fp32": 10.0, "bf16": 9.9, "int8": 9.5}, "bf16"),
        ({"fp32": 10.0, "bf16": 9.0, "int8": 5.0}, "int8"),
    ],
)
def test_of_two_that_are_alike_the_more_precise_wins(times: dict[str, float], winner: str) -> None:
    found = [Candidate(backend="openvino", precision=precision, ms=ms) for precision, ms in times.items()]
    assert pick(found, "m").precision == winner


def test_what_was_passed_over_or_not_timed_never_wins() -> None:
    found = [
        Candidate(backend="openvino", precision="int8", ms=1.0, objection="wrong"),
        Candidate(backend="openvino", precision="bf16"),
        Candidate(backend="onnxruntime", precision="fp32", ms=50.0),
    ]
    assert pick(found, "m") is found[2]
    with pytest.raises(GateError, match="openvino int8: wrong"):
        pick(found[:1], "m")


def test_no_backend_at_all(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no backend can run model: .*not at int8"):
        Segmenter.open(write_colour_model(tmp_path / "model.onnx"), precision="int8")
