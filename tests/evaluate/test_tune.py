"""Tuning on real runtimes: what it tries, that its figures add up, and that `auto` goes by it afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from colour_graph import colour_graph, colour_spec, write_colour_model

from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.evaluate.tune import BATCHES, TuneOptions, TuneResult, difference, settings, tune
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.runtime.decisions import place_of, usable_cores
from ddsm_deploy.runtime.pipeline import open_for_batch
from ddsm_deploy.runtime.segmenter import Segmenter

QUICK = 0.05  # seconds of timed runs: each candidate gets its one turn


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need) -> Path:
    """A cache of this test's own."""
    need("openvino")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def check(result: TuneResult) -> None:
    """What holds for every result."""
    for row in result.rows:
        if row.latencies_ms:
            assert row.percentile(50) <= row.percentile(99) <= max(row.latencies_ms)
            assert row.fps == pytest.approx(len(row.latencies_ms) * row.batch / row.seconds)
            assert sum(row.latencies_ms) / 1e3 <= row.seconds * row.workers * 1.01
            assert row.candidate.changed == 0 or row.candidate.precision != "fp32"
    assert result.best in result.rows
    assert result.usual in result.rows
    assert result.usual.usual
    assert result.best.batch == 1
    assert not result.best.candidate.objection
    assert result.gain > 0.95  # what runs untuned is among the candidates
    fields = json.loads(result.to_json())
    assert len(fields["rows"]) == len(result.rows)
    assert fields["rows"][fields["best"]]["backend"] == result.best.candidate.backend


def test_for_latency_and_auto_goes_by_it(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    seen: list[float] = []
    result = tune(model, TuneOptions(seconds=QUICK), progress=lambda text, share: seen.append(share))
    check(result)
    assert {row.workers for row in result.rows} == {1}
    assert {row.candidate.backend for row in result.rows} == {"onnxruntime", "openvino"}
    assert {"spinning": False} in [row.candidate.options for row in result.rows]
    assert all(0 <= share <= 1 for share in seen)
    assert "tried with --for throughput" in result.batch
    assert result.kept == place_of(result.decision.facts)
    with Segmenter.open(model) as segmenter:
        best = result.best.candidate
        assert segmenter.decision == result.decision
        assert segmenter.choice.startswith(f"{result.best.label()} (")
        assert ", tuned earlier (" in segmenter.choice
        assert segmenter.options == best.trial().applied(EngineOptions())


def test_for_throughput_and_batches_go_by_it(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx", dynamic=True)
    result = tune(model, TuneOptions(goal="throughput", seconds=QUICK))
    check(result)
    assert {row.workers for row in result.rows} == {usable_cores()}
    assert {row.batch for row in result.rows} == {1, *BATCHES}
    assert "above 1 only for comparison" in result.batch
    with open_for_batch(model) as segmenter:
        assert segmenter.decision == result.decision
        assert segmenter.backend == result.best.candidate.backend
    with Segmenter.open(model) as segmenter:  # one image at a time is another question
        assert segmenter.decision != result.decision


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    result = tune(write_colour_model(tmp_path / "model.onnx"), TuneOptions(goal="throughput", seconds=QUICK))
    assert {row.batch for row in result.rows} == {1}
    assert "fixed to 1 (export one with --dynamic batch to try more)" in result.batch


def test_a_wrong_variant_is_shown_and_not_tuned(tmp_path: Path) -> None:
    right = write_colour_model(tmp_path / "a.onnx")
    graph = colour_graph(colour_spec(channel_order="rgb"))  # takes red for blue, and says that it does not
    spec = colour_spec().replace(precision="int8").with_provenance(source_sha256="a" * 64)
    onnx.helper.set_model_props(graph, {"ddsm.spec": spec.to_json()})
    onnx.save(graph, tmp_path / "b.onnx")
    reference = colour_graph(colour_spec().with_provenance(source_sha256="a" * 64))
    onnx.save(reference, right)
    make_bundle(tmp_path / "b", [right, tmp_path / "b.onnx"])
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.png"), np.full((8, 12, 3), (200, 100, 0), np.uint8))
    result = tune(tmp_path / "b", TuneOptions(seconds=QUICK, images=images))
    check(result)
    assert result.decision.frames == f"1 images of {images}"
    wrong = [row for row in result.rows if row.candidate.precision.startswith("int8")]
    assert wrong
    for row in wrong:
        assert row.candidate.changed == 100
        assert not row.latencies_ms
        assert row.fields()["error"] == "100 % of the pixels changed class, expected at most 3 %"


@pytest.mark.parametrize("cores", [1, 2, 4, 64])
@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "tensorrt"])
def test_settings_are_few_all_different_and_begin_with_the_usual(backend: str, goal: str, cores: int) -> None:
    found = list(settings(backend, goal, cores))
    assert 1 <= len(found) <= 8
    assert all(found.count(one) == 1 for one in found)
    assert all(1 <= one.get(key, 1) <= cores for one in found for key in ("threads", "streams"))
    if goal == "latency" or backend == "tensorrt":
        assert found[0] == {}


def test_differences_in_words() -> None:
    usual = {"backend": "onnxruntime", "precision": "fp32", "batch": 1, "options": {}}
    best = {"backend": "openvino", "precision": "int8", "batch": 1, "options": {"threads": 1}}
    assert difference(usual, usual) == ""
    assert difference(best, usual) == "backend onnxruntime → openvino, precision fp32 → int8, threads default → 1"


@pytest.mark.parametrize("changes", [{"goal": "speed"}, {"seconds": 0.0}, {"seconds": math.nan}])
def test_wrong_options(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        TuneOptions(**changes)  # type: ignore[arg-type]


def test_what_cannot_be_tuned(tmp_path: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(ArtifactError):
        tune(tmp_path / "none.onnx")
    with pytest.raises(BackendError, match="nothing to tune: no backend but torch can run it"):
        tune(tiny_checkpoint)
    with pytest.raises(InputError, match="no such folder"):
        tune(write_colour_model(tmp_path / "model.onnx"), TuneOptions(images=tmp_path / "none"))
