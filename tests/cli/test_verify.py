"""`ddsm verify` as a user meets it: figures, JSON, picture, layers, the gate, and one clear line an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from broken_graphs import swapped_axes
from colour_data import random_map, write_colour_data
from colour_graph import write_colour_model
from onnx import helper

from ddsm_deploy.evaluate.verify import MAX_CHANGED
from ddsm_deploy.images import read_image
from ddsm_deploy.onnxfile import read_spec
from ddsm_deploy.spec import METADATA_KEY


def ddsm_verify(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddsm_deploy", "verify", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A colour model, and one in which red and blue trade places."""
    folder = tmp_path_factory.mktemp("models")
    right = write_colour_model(folder / "right.onnx", size=(64, 96))
    model = onnx.load(write_colour_model(folder / "mirrored.onnx", size=(64, 96), channel_order="rgb"))
    helper.set_model_props(model, {METADATA_KEY: read_spec(right).to_json()})
    onnx.save(model, folder / "mirrored.onnx")
    return right, folder / "mirrored.onnx"


def test_two_backends_of_one_file(pair: tuple[Path, Path], data: Path, need) -> None:
    need("openvino")
    done = ddsm_verify(pair[0], "--data", data / "images", "--backend-b", "openvino")
    assert (done.returncode, done.stderr) == (0, "")
    assert "A: right.onnx on onnxruntime fp32\nB: right.onnx on openvino fp32\n" in done.stdout
    assert "5 frames, 30720 pixels: 0 % changed class (budget 0.1 %)" in done.stdout
    assert "mIoU" not in done.stdout


def test_the_gate_the_figures_and_the_picture(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "worst.png"
    arguments = (*pair, "--data", data, "--dataset", "folder", "--images", "3", "--json", report, "--picture", picture)
    done = ddsm_verify(*arguments)
    fields = json.loads(report.read_text(encoding="utf-8"))  # written all the same
    seen = [random_map(index) for index in (0, 2, 4)]
    changed = 100 * sum(int((mask != 1).sum()) for mask in seen) / (3 * 64 * 96)
    assert fields["changed"] == pytest.approx(changed)
    assert done.returncode == 3
    assert done.stderr == (f"ddsm: not the same: {changed:.3g} % of the pixels changed class, expected at most 0.1 %\n")
    for shown in ("commonest changes", "│ red ", f"mIoU: A {fields['miou_a']:.2f}", "worst frames: images/", "100.00"):
        assert shown in done.stdout
    assert read_image(picture).shape[1] > 2000
    assert ddsm_verify(*arguments, "--max-changed", "100").returncode == 0
    assert ddsm_verify(*arguments, "--max-changed", "100", "--max-miou-drop", "0.5").returncode == 3


def test_layers(tiny_onnx: Path, scenes: Path, tmp_path: Path) -> None:
    wrong = swapped_axes(tiny_onnx, tmp_path / "swapped.onnx")
    done = ddsm_verify(tiny_onnx, wrong, "--data", scenes / "images", "--images", "2", "--layers", "--json", "-")
    first = next(node for node in onnx.load(tiny_onnx).graph.node if node.op_type == "GridSample")
    assert json.loads(done.stdout)["layers"]["first"] == first.output[0]
    assert "largest jumps of the error" in done.stderr  # the text makes way for the JSON
    assert f"the runs part at {first.name} (GridSample)" in done.stderr
    assert done.returncode == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((), "A and B are one and the same, right.onnx on onnxruntime fp32, and would always agree"),
        (("--data", "nowhere"), "nowhere: no such file or folder"),
        (("--backend-b", "tflite"), "backend is 'tflite'"),
        (("--images", "0"), "images is 0"),
        (("--max-miou-drop", "1"), "needs labels"),
        (("--noise-floor", "0.1"), "--noise-floor belongs to --layers"),
        (("--picture", "worst.jpg"), "worst.jpg: the picture is a PNG"),
        (("--boundary", "-1"), "boundary is -1 pixels"),
    ],
)
def test_errors_are_one_line(change: tuple[str, ...], words: str, pair: tuple[Path, Path], data: Path) -> None:
    other = () if not change else (pair[1],)
    done = ddsm_verify(pair[0], *other, "--data", data / "images", *change)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    assert words in line


def test_no_data_is_wrong_usage(pair: tuple[Path, Path]) -> None:
    assert ddsm_verify(*pair).returncode == 2


def test_the_help_states_the_budgets() -> None:
    text = " ".join(ddsm_verify("--help").stdout.replace("│", " ").split())
    for name, precision in (("fp32", "fp32"), ("fp16/bf16", "bf16"), ("int8", "int8")):
        assert f"{MAX_CHANGED[precision]:g} for {name}" in text
