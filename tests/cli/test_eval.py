"""`ddsm eval` as a user meets it: the table, the JSON, the gate, and one clear line an error."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from colour_data import COUNT, expected_iou, write_colour_data
from colour_graph import CLASSES

from ddsm_deploy.cli.evaluate import evaluate
from ddsm_deploy.evaluate.metrics import BOUNDARY_TOLERANCE


def ddsm_eval(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddsm_deploy", "eval", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def on_colours(colour_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Arguments that evaluate the colour model on a data set that it gets half right."""
    data = write_colour_data(tmp_path_factory.mktemp("data"))
    return (colour_onnx, "--data", data, "--dataset", "folder", "--backend", "onnxruntime")


def test_table_and_json_file(on_colours: tuple[str | Path, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = ddsm_eval(*on_colours, "--boundary-tolerance", "2", "--json", report)
    assert done.returncode == 0, done.stderr
    fields = json.loads(report.read_text(encoding="utf-8"))
    assert fields.keys() >= {"miou", "pixel_accuracy", "boundary_f", "per_class", "backend", "precision"}
    assert (fields["backend"], fields["precision"], fields["images"]) == ("onnxruntime", "fp32", COUNT)
    assert fields["boundary_tolerance_px"] == 2
    iou = expected_iou(Path(on_colours[2]))
    assert [*fields["per_class"].values()] == pytest.approx(iou)
    mean = f"mIoU {sum(iou) / 3:.2f} %"
    for shown in (*CLASSES, "boundary F % (2 px)", mean, f"{iou[0]:.2f}", f"{fields['boundary_f']:.2f}"):
        assert shown in done.stdout
    assert done.stderr == ""


def test_json_on_standard_output_stands_alone(on_colours: tuple[str | Path, ...]) -> None:
    done = ddsm_eval(*on_colours, "--json", "-")
    assert json.loads(done.stdout)["miou"] > 0
    assert "green" in done.stderr  # the table makes way


def test_the_gate(on_colours: tuple[str | Path, ...], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    missed = ddsm_eval(*on_colours, "--min-miou", "99.5", "--json", report)
    reached = json.loads(report.read_text(encoding="utf-8"))["miou"]  # written all the same
    assert missed.returncode == 3
    assert missed.stderr == f"ddsm: mIoU is {reached:.3f}; expected at least 99.5\n"
    assert ddsm_eval(*on_colours, "--min-miou", f"{reached - 0.01}").returncode == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--data", "nowhere"), "nowhere: no such folder"),
        (("--dataset", "voc"), "data set kind is 'voc'; expected camvid, cityscapes or folder"),
        (("--backend", "tflite"), "backend is 'tflite'"),
        (("--threads", "0"), "threads is 0"),
        (("--boundary-tolerance", "-1"), "boundary tolerance is -1 pixels"),
        (("--json", "/dev/null/report.json"), "/dev/null/report.json: can't be written ("),
        (("--precision", "bf8"), "precision is 'bf8'"),
    ],
)
def test_errors_are_one_line(on_colours: tuple[str | Path, ...], change: tuple[str, str], words: str) -> None:
    done = ddsm_eval(*on_colours, *change)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    assert words in line


def test_other_classes(on_colours: tuple[str | Path, ...], scenes: Path) -> None:
    done = ddsm_eval(*on_colours, "--data", scenes)
    assert done.returncode == 1
    assert "only the model has blue, green, red; only the data set has bicyclist, building" in done.stderr


def test_several_rows_are_one_table(on_colours: tuple[str | Path, ...], tmp_path: Path, need) -> None:
    need("openvino")
    report = tmp_path / "report.json"
    done = ddsm_eval(*on_colours, "--backend", "openvino", "--max-drop", "0.1", "--json", report)
    assert (done.returncode, done.stderr) == (0, "")
    iou = expected_iou(Path(on_colours[2]))
    lines = [line.split() for line in done.stdout.splitlines() if line.strip().startswith("colours.onnx")]
    mean = f"{sum(iou) / 3:.2f}"
    assert [line[:6] for line in lines] == [
        ["colours.onnx", "fp32", "onnxruntime", "fp32", mean, "–"],
        ["colours.onnx", "fp32", "openvino", "fp32", mean, "+0.00"],
    ]
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert [row["backend"] for row in rows] == ["onnxruntime", "openvino"]
    missed = ddsm_eval(*on_colours, "--backend", "openvino", "--min-miou", "99")
    assert missed.returncode == 3
    assert missed.stderr.count("; expected at least 99") == 2


def test_a_row_that_can_not_run_is_an_error_if_asked_for(on_colours: tuple[str | Path, ...]) -> None:
    done = ddsm_eval(*on_colours, "--precision", "fp32", "--precision", "bf16")
    assert done.returncode == 1
    assert "not run: colours.onnx on onnxruntime bf16: onnxruntime runs" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: onnxruntime runs colours at fp32")
    rest = ddsm_eval(on_colours[0], "--all", *on_colours[1:])
    assert rest.returncode == 0, rest.stderr


def test_no_data_is_wrong_usage(colour_onnx: Path) -> None:
    assert ddsm_eval(colour_onnx).returncode == 2


def test_the_default_tolerance_is_the_library_s() -> None:
    assert inspect.signature(evaluate).parameters["boundary_tolerance"].default == BOUNDARY_TOLERANCE
