"""Quantizing a real network for each target: the file, its record, the gate, and the command."""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from outlier_graph import write_outlier_model
from processor import WEIGHT_BITS

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import IGNORE, open_dataset
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, GateError, InputError
from ddsm_deploy.frames import FrameList, frames_in, frames_of
from ddsm_deploy.images import read_image
from ddsm_deploy.optimize.quantize import JUDGES, TARGETS, QuantizeOptions, QuantizeReport, quantize
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import sha256_of

LOOSE = {
    "changed": 8.0,
    "miou_drop": 5.0,
    "weight_bits": WEIGHT_BITS,
}  # the tiny network has 16 channels: INT8 harms it more than a real one


@pytest.fixture(scope="module")
def frames(scenes: Path) -> FrameList:
    return frames_of(open_dataset("folder", scenes, ""))


@pytest.fixture(scope="module", params=TARGETS)
def report(
    request: pytest.FixtureRequest,
    tiny_onnx: Path,
    frames: FrameList,
    tmp_path_factory: pytest.TempPathFactory,
    need,
) -> QuantizeReport:
    for module in ("onnxruntime", JUDGES[request.param]):
        need(module)
    output = tmp_path_factory.mktemp("int8") / f"{request.param}.onnx"
    return quantize(tiny_onnx, output, frames, QuantizeOptions(target=request.param, images=8, **LOOSE))


def test_the_record_says_how_it_was_made(report: QuantizeReport, tiny_onnx: Path, frames: FrameList) -> None:
    artifact = resolve(report.path)
    facts = artifact.spec.provenance
    assert artifact.spec == report.spec
    assert (artifact.spec.precision, artifact.target) == ("int8", facts["target"])
    assert facts["float_sha256"] == sha256_of(tiny_onnx)
    assert facts["calibration.images"] == "8"
    assert facts["calibration.sha256"] == frames.spread(8).fingerprint()
    assert facts["calibration.method"] == "percentile 99.99"
    assert facts["quantized"] == f"{len(report.search.quantized)} of {report.layers} convolutions"
    assert float(facts["parity.changed"]) == pytest.approx(report.parity.changed, abs=0.01)
    assert report.sha256 == sha256_of(report.path)
    assert report.bytes < 0.5 * tiny_onnx.stat().st_size


def test_fused_sampling_stays_fused_but_for_tensorrt(
    report: QuantizeReport, tiny_fused: Path, frames: FrameList, tmp_path: Path
) -> None:
    """Only convolutions are quantized, the same ones as in the portable file, and the masks are about as good."""
    target = report.spec.provenance["target"]
    options = QuantizeOptions(target=target, images=8, **LOOSE)
    made = quantize(tiny_fused, tmp_path / "fused.onnx", frames, options)
    assert made.layers == report.layers
    assert made.parity.changed == pytest.approx(report.parity.changed, abs=0.5)
    model, portable = onnx.load(made.path), onnx.load(report.path)
    kinds = [collections.Counter(node.op_type for node in m.graph.node) for m in (model, portable)]
    if target == "tensorrt":
        assert made.spec.provenance["sampling"] == "portable"
        assert kinds[0] == kinds[1]
        assert not model.functions
    else:
        assert made.spec.provenance["sampling"] == "fused"
        assert (kinds[0]["DynamicSampleAttention"], len(model.functions)) == (kinds[1]["GridSample"], 1)
        quantizers = {"QuantizeLinear", "DequantizeLinear", "Conv"}
        assert {op: kinds[0][op] for op in quantizers} == {op: kinds[1][op] for op in quantizers}


def test_what_is_left_out_is_float_in_the_file(report: QuantizeReport) -> None:
    model = onnx.load(report.path)
    made = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    integer = {n.name for n in model.graph.node if n.op_type == "Conv" and n.input[1] in made}
    assert integer == set(report.search.quantized)
    assert len(report.search.quantized) + len(report.search.kept) == report.layers


def test_parity_is_measured_on_other_frames(report: QuantizeReport, frames: FrameList, tiny_onnx: Path) -> None:
    """The same comparison, made here by hand."""
    others = frames.without(frames.spread(8))
    assert report.parity.images == len(others) == 16
    different = pixels = 0
    k = len(report.spec.classes)
    counts = np.zeros((2, k, k), np.int64)
    backend = JUDGES[report.spec.provenance["target"]]
    with (
        Segmenter.open(tiny_onnx, backend=backend) as whole,
        open_engine(resolve(report.path), backend, EngineOptions()) as engine,  # type: ignore[attr-defined]
    ):
        for entry in others:
            image = whole.prepare(read_image(entry.path))
            want, got = whole.infer(image)["mask"], engine.run({"image": image})["mask"]
            # the labels are larger than the network's input, and masks are compared at their size
            assert entry.labels is not None
            labels = entry.labels()
            a, b = (whole.finish({"mask": mask}, labels.shape).mask for mask in (want, got))
            different += int((a != b).sum())
            pixels += a.size
            for matrix, mask in zip(counts, (a, b), strict=True):
                np.add.at(matrix, (labels[labels != IGNORE], mask[labels != IGNORE]), 1)
    assert report.parity.changed == pytest.approx(100 * different / pixels, abs=1e-9)
    for miou, matrix in zip((report.parity.miou_a, report.parity.miou_b), counts, strict=True):
        hit, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        assert miou == pytest.approx(100 * (hit[union > 0] / union[union > 0]).mean(), abs=1e-9)
    # a network that tells classes apart, so that there is something to lose
    assert report.parity.miou_a is not None and report.parity.miou_a > 15


def test_the_same_again_gives_the_same_bytes(report: QuantizeReport, tiny_onnx: Path, frames: FrameList) -> None:
    again = report.path.with_name("again.onnx")
    options = QuantizeOptions(target=report.spec.provenance["target"], images=8, **LOOSE)
    assert quantize(tiny_onnx, again, frames, options).sha256 == report.sha256


def test_fp16_beside_int8(tiny_onnx: Path, frames: FrameList, tmp_path: Path, need) -> None:
    for module in ("onnxruntime", "openvino"):
        need(module)
    options = QuantizeOptions(target="tensorrt", fp16=True, images=8, **LOOSE)
    report = quantize(tiny_onnx, tmp_path / "mixed.onnx", frames, options)
    assert report.spec.precision == "int8+fp16"
    with pytest.raises(BackendError, match="openvino runs it"):  # it would give other classes
        open_engine(resolve(report.path), "onnxruntime")
    with Segmenter.open(report.path, backend="openvino") as segmenter:
        assert report.checked_on == f"openvino {segmenter.precision}"
        assert segmenter.precision in ("int8", "int8+fp16")  # what really runs: few CPUs compute in float16


def test_what_fails_the_budget_is_not_written(tiny_onnx: Path, frames: FrameList, tmp_path: Path, need) -> None:
    need("onnxruntime")
    output = tmp_path / "strict.onnx"
    fine = {"target": "onnxruntime", "images": 2, "changed": 0.0, "miou_drop": 0.0}
    keep_none = QuantizeOptions(**fine)
    try:
        report = quantize(tiny_onnx, output, frames, keep_none)
    except GateError as exc:
        assert "not written" in str(exc) and "changed class" in str(exc)
        assert not output.exists() and list(tmp_path.iterdir()) == []
        forced = quantize(tiny_onnx, output, frames, QuantizeOptions(**fine, force=True))
        assert output.exists() and not forced.parity
        assert float(forced.spec.provenance["parity.changed"]) > 0
    else:  # the search found layers enough to leave out: then nothing at all may have changed
        assert report.parity.changed == 0.0


def test_named_layers_are_kept(tiny_onnx: Path, frames: FrameList, tmp_path: Path, need) -> None:
    need("onnxruntime")
    options = QuantizeOptions(target="onnxruntime", images=4, keep=("head.*", "fusions.0.*"), **LOOSE)
    report = quantize(tiny_onnx, tmp_path / "kept.onnx", frames, options)
    model = onnx.load(report.path)
    made = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    floats = [n.input[1] for n in model.graph.node if n.op_type == "Conv" and n.input[1] not in made]
    assert "network.head.1.weight" in floats
    assert sum(name.startswith("network.fusions.0.") for name in floats) > 5
    said = report.spec.provenance["kept"].split()
    assert len(said) == report.layers - len(report.search.quantized)
    assert any(name.startswith("fusions.0.") for name in said)
    for keep, words in (("neck", "which no layer is called"), ("*", "none of the model's .* is left to quantize")):
        with pytest.raises(ConfigError, match=words):
            quantize(
                tiny_onnx, tmp_path / "x.onnx", frames, QuantizeOptions(target="onnxruntime", images=4, keep=(keep,))
            )


def test_what_can_not_be_checked_on_is_told_before_the_search(
    tiny_onnx: Path, frames: FrameList, tmp_path: Path, need
) -> None:
    need("onnxruntime")
    for entry in frames:
        (tmp_path / entry.path.name).write_bytes(entry.path.read_bytes())
    mine = frames_in(tmp_path)
    (unused, *_) = mine.without(mine.spread(2))  # calibration does not read it
    unused.path.write_bytes(unused.path.read_bytes()[:-100])
    seen: list[str] = []
    options = QuantizeOptions(target="onnxruntime", images=2, sensitivity=True, **LOOSE)
    with pytest.raises(InputError, match="truncated"):
        quantize(tiny_onnx, tmp_path / "x.onnx", mine, options, progress=lambda text, *_: seen.append(text))
    assert not any("layer" in text for text in seen)


def test_a_name_by_which_it_would_not_be_known_again(tiny_onnx: Path, frames: FrameList, tmp_path: Path) -> None:
    for name in ("int8", "mine.safetensors"):
        with pytest.raises(InputError, match=r"expected a name that ends in \.onnx"):
            quantize(tiny_onnx, tmp_path / name, frames, QuantizeOptions(target="onnxruntime", images=4))


def test_options_that_do_not_fit() -> None:
    for fields, said in (
        ({"target": "tpu"}, "target is 'tpu'"),
        ({"target": "openvino", "fp16": True}, "fp16 beside INT8 is for tensorrt"),
        ({"target": "openvino", "method": "guess"}, "method is 'guess'"),
        ({"target": "openvino", "images": 0}, "images is 0"),
        ({"target": "openvino", "weight_bits": 4}, "expected 7 or 8"),
        ({"target": "openvino", "changed": -1.0}, "changed is -1.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            QuantizeOptions(**fields)


def test_inputs_that_do_not_fit(
    report: QuantizeReport, tiny_checkpoint: Path, frames: FrameList, tmp_path: Path
) -> None:
    outlier = write_outlier_model(tmp_path / "m.onnx", size=(8, 12))
    options = QuantizeOptions(target="onnxruntime", images=4)
    with pytest.raises(ArtifactError, match="written in int8; quantize the float32 file"):
        quantize(report.path, tmp_path / "x.onnx", frames, options)
    with pytest.raises(ArtifactError, match="ddsm export"):
        quantize(tiny_checkpoint, tmp_path / "x.onnx", frames, options)
    source = resolve(outlier).file("onnx")
    before = source.read_bytes()
    with pytest.raises(InputError, match="belongs to the model that is read"):
        quantize(outlier, source, frames, options)
    assert source.read_bytes() == before
    with pytest.raises(InputError, match="expected at least 2"):
        quantize(outlier, tmp_path / "x.onnx", frames.spread(1), options)


def test_the_command(tiny_onnx: Path, scenes: Path, tmp_path: Path, need) -> None:
    need("openvino")
    command = [sys.executable, "-m", "ddsm_deploy", "quantize", str(tiny_onnx), "--calibration", str(scenes / "images")]
    command += ["--target", "openvino", "--images", "4", "--max-changed", "8", "--json", "out.json", "-o", "q.onnx"]
    command += ["--weight-bits", str(WEIGHT_BITS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning: only 4 images to calibrate on" in done.stdout
    assert "convolutions in INT8 for openvino" in done.stdout
    fields = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert fields["parity"]["passed"] is True and fields["parity"]["miou_a"] is None
    with Segmenter.open(tmp_path / "q.onnx", backend="openvino") as segmenter:
        assert segmenter.precision == "int8"
        assert np.unique(segmenter.predict(np.zeros((64, 96, 3), np.uint8)).mask).size >= 1
