"""`ddsm bench` as a user meets it: the table, the JSON, and one clear line an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def ddsm_bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddsm_deploy", "bench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_table_and_json(colour_onnx: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    quick = ("--runs", "3", "--warm-up", "1", "--threads", "1", "--json", report)
    done = ddsm_bench(colour_onnx, "--backend", "onnxruntime", "--precision", "fp32", "--precision", "int8", *quick)
    assert done.returncode == 0, done.stderr
    fields = json.loads(report.read_text(encoding="utf-8"))
    assert fields["machine"]["cores_usable"] >= 1
    good, bad = fields["rows"]
    assert good.keys() >= {"backend", "precision", "p50_ms", "p95_ms", "p99_ms", "max_ms", "fps", "load_ms", "first_ms"}
    assert good.keys() >= {"peak_mb", "infer_p50_ms", "threads", "runs"}
    assert (good["backend"], good["precision"], good["runs"], good["threads"]) == ("onnxruntime", "fp32", 3, 1)
    assert (bad["precision"], "p50_ms" in bad) == ("int8", False)
    assert f"onnxruntime int8: {bad['error']}" in done.stdout.splitlines()
    assert f"{good['p50_ms']:.1f}" in done.stdout
    assert f"{good['peak_mb']:.0f}" in done.stdout


def test_nothing_that_can_run(colour_onnx: Path) -> None:
    done = ddsm_bench(colour_onnx, "--backend", "onnxruntime", "--precision", "int8", "--json", "-")
    assert done.returncode == 1
    assert "error" in json.loads(done.stdout)["rows"][0]
    assert done.stderr.splitlines()[-1] == "ddsm: no backend could run this model; the reasons are above"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--backend", "tflite"), "backend is 'tflite'; expected one of"),
        (("--precision", "fp8"), "precision is 'fp8'; expected one of"),
        (("--runs", "0"), "runs is 0"),
        (("--images", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(colour_onnx: Path, arguments: tuple[str, str], words: str) -> None:
    done = ddsm_bench(colour_onnx, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    assert words in line


def test_no_such_model(tmp_path: Path) -> None:
    done = ddsm_bench(tmp_path / "missing.onnx")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "missing.onnx" in done.stderr
