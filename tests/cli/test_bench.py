"""`ddsm bench` as a user meets it: the table, the JSON, and one clear line an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
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
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ddsm: asked for, and not run: int8; the reasons are above"
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


def test_what_was_not_named_may_be_missing(colour_onnx: Path) -> None:
    done = ddsm_bench(colour_onnx, "--backend", "onnxruntime", "--runs", "1", "--warm-up", "0")
    assert done.returncode == 0, done.stderr


def test_a_named_backend_that_is_not_run(colour_onnx: Path) -> None:
    done = ddsm_bench(colour_onnx, "--backend", "onnxruntime", "--backend", "torch", "--runs", "1", "--warm-up", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ddsm: asked for, and not run: torch; the reasons are above"


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
        (("--provider", "rocm"), "provider is 'rocm'; expected one of"),
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


PACED = ("--rate", "20", "--duration", "0.5", "--backend", "onnxruntime", "--threads", "1", "--warm-up", "1")


def test_at_a_cameras_pace(colour_onnx: Path, tmp_path: Path, need) -> None:
    need("matplotlib")
    report, plot = tmp_path / "paced.json", tmp_path / "paced.png"
    done = ddsm_bench(colour_onnx, *PACED, "--load", "1", "--json", report, "--plot", plot, "--per-frame")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    fields = json.loads(report.read_text(encoding="utf-8"))
    assert (fields["frames"], len(fields["latencies_ms"]), fields["settings"]["load"]) == (10, 10, 1)
    assert f"p99 {fields['p99_ms']:.1f}" in done.stdout
    assert "backend: onnxruntime, as asked for" in done.stdout.splitlines()
    assert "busy processes beside it: 1" in done.stdout
    with PIL.Image.open(plot) as image:
        assert image.format == "PNG"


def test_ctrl_c_at_pace_keeps_what_was_measured(colour_onnx: Path, tmp_path: Path) -> None:
    report = tmp_path / "paced.json"
    asked = ("--rate", "50", "--duration", "600", "--backend", "onnxruntime", "--warm-up", "0", "--load", "1")
    command = [sys.executable, "-m", "ddsm_deploy", "bench", str(colour_onnx), *asked, "--json", str(report)]
    told = {**os.environ, "FORCE_COLOR": "1"}  # as to a terminal: it says when frames begin to come
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=told, start_new_session=True
    ) as run:
        assert run.stderr is not None
        while line := run.stderr.readline():
            if "frames in 600 s" in line:
                break
        time.sleep(2)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does, to all that it started
        output, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "ddsm: interrupted" in errors
    fields = json.loads(report.read_text(encoding="utf-8"))
    assert fields["interrupted"] is True
    assert 1 <= fields["delivered"] <= fields["frames"] < 1000
    assert f"{fields['frames']} frames at 50 a second" in output


@pytest.mark.parametrize(("baseline_ms", "code"), [(1e6, 0), (1e-6, 3)])
def test_gate(colour_onnx: Path, tmp_path: Path, baseline_ms: float, code: int) -> None:
    """No run is slower than a quarter of an hour a frame, nor as quick as a nanosecond."""
    settings = {"model": "colours", "precision": "fp32", "rate": 20.0, "policy": "every"}
    earlier = {"settings": settings, "machine": {"cpu": "abacus"}, "p50_ms": baseline_ms, "p99_ms": baseline_ms}
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(earlier), encoding="utf-8")
    report = tmp_path / "now.json"
    done = ddsm_bench(colour_onnx, *PACED, "--baseline", baseline, "--max-misses", "10", "--json", report)
    assert done.returncode == code
    verdict = json.loads(report.read_text(encoding="utf-8"))["verdict"]  # written whatever comes of the gate
    assert verdict["passed"] is (code == 0)
    lines = done.stdout.splitlines()
    assert "warning: the baseline ran with other settings: policy every, here latest" in lines
    assert any(line.startswith("warning: the baseline is of another machine: cpu abacus, here ") for line in lines)
    judged = [line.split(":")[:2] for line in lines if line.startswith(("pass: ", "FAIL: "))]
    slow = "pass" if code == 0 else "FAIL"
    assert judged[:3] == [[slow, " p50"], [slow, " p99"], ["pass", " frames without a mask in time"]]
    if code:
        (line,) = done.stderr.splitlines()
        assert line.startswith("ddsm: over budget: p50: ")
        assert "; p99: " in line
    else:
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--deadline-ms", "40"), "--deadline-ms goes with --rate alone"),
        (("--max-misses", "0"), "--max-misses goes with --rate alone"),
        (("--per-frame",), "--per-frame goes with --rate alone"),
        (("--rate", "0"), "the rate is 0.0 frames a second"),
        (("--rate", "30", "--runs", "5"), "--runs does not go with --rate"),
        (("--rate", "30", "--backend", "torch", "--backend", "openvino"), "--backend is given 2 times"),
        (("--rate", "30", "--max-slower", "5"), "--max-slower needs the --baseline"),
        (("--rate", "30", "--baseline", "nowhere.json"), "nowhere.json: can't be read"),
        (("--rate", "30", "--images", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_errors_of_pace_are_one_line(colour_onnx: Path, arguments: tuple[str, ...], words: str) -> None:
    done = ddsm_bench(colour_onnx, *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    assert words in line
