"""`benchmarks/gpu_report.py`, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_report.py"


@pytest.fixture
def report(need) -> ModuleType:
    for module in ("cuda", "onnx"):
        need(module)
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_report"] = module  # dataclasses look there for the types of their fields
    spec.loader.exec_module(module)
    return module


def row(**fields: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("build_s", "mb", "changed", "within", "p50_ms", "p99_ms", "infer_ms", "fps"))
    named = {"target": "tensorrt", "precision": "fp16", "sampling": "portable"}
    return {**named, "error": "", "layers": "", **plain, **fields}


RESULT: dict[str, Any] = {
    "gpu": "NVIDIA RTX A2000 (compute capability 86, driver for CUDA 13.0)",
    "libraries": {"tensorrt": "10.13.3.9"},
    "left_out": ["tensorrt-rtx needs a cable"],
    "machine": {"cpu": "a CPU", "system": "Linux", "started": "2026-11-25T12:00:00Z"},
    "tests": {"exit_code": 0, "summary": "12 passed", "output": "12 passed"},
    "rows": [
        row(
            build_s=41.4,
            mb=9.31,
            changed=0.0312,
            within=True,
            p50_ms=1.234,
            p99_ms=2.0,
            infer_ms=0.9,
            fps=800.4,
            layers="90 Conv Half",
        ),
        row(precision="int8", error="it stopped"),
    ],
    "plugin": {"skipped": "there is no checkpoint"},
}


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path, need, missing) -> None:
    need("cuda")
    from ddsm_deploy.engines.cuda import find_gpu

    if find_gpu() is not None:
        missing("no-gpu", "there is a GPU here")
    command = [sys.executable, str(SCRIPT), "-o", "report.md"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("gpu_report: no NVIDIA GPU can be used here: ")
    assert done.stderr.endswith("nothing was run and no report written\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_report_people_read(report: ModuleType) -> None:
    text = report.markdown(RESULT)
    assert "NVIDIA RTX A2000 (compute capability 86, driver for CUDA 13.0); tensorrt 10.13.3.9; a CPU, Linux" in text
    assert "Left out: tensorrt-rtx needs a cable." in text
    assert "Tests marked `gpu`: 12 passed (exit code 0)." in text
    assert "| tensorrt | fp16 | portable | 41 | 9.3 | 0.03 | yes | 1.23 | 2.00 | 0.90 | 800 | 90 Conv Half |" in text
    assert "| tensorrt | int8 | portable | – | – | – | – | – | – | – | – | – |" in text
    assert "- tensorrt int8 portable: it stopped" in text
    assert "own CUDA kernel (a TensorRT plugin, experimental): skipped, there is no checkpoint.\n" in text
    assert "```" not in text
    failed = RESULT | {"tests": {"exit_code": 1, "summary": "1 failed", "output": "FAILED test_x"}}
    assert "FAILED test_x" in report.markdown(failed)


def test_the_plugin_stands_beside_grid_sample(report: ModuleType) -> None:
    fused = row(sampling="fused", changed=0.04, infer_ms=0.63)
    text = report.markdown(RESULT | {"rows": [*RESULT["rows"], fused], "plugin": {}})
    assert "| tensorrt | fp16 | fused |" in text
    # 0.63 of 0.9 ms
    assert "- fp16: infer 0.63 ms, 0.70 of the 0.90 ms with GridSample; changed 0.04 % and 0.03 %" in text
    broken = row(sampling="fused", error="the plugin stopped")
    text = report.markdown(RESULT | {"rows": [*RESULT["rows"], broken], "plugin": {}})
    assert "- tensorrt fp16 fused: the plugin stopped" in text
    assert "experimental): no figures." in text


def test_why_there_is_no_plugin(report: ModuleType, tmp_path: Path, colour_onnx: Path) -> None:
    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.engines import BackendStatus

    rtx, tensorrt = (BackendStatus(name, True, version="1") for name in ("tensorrt-rtx", "tensorrt"))
    assert report._fused(resolve(colour_onnx), tmp_path, [rtx]) == (
        None,
        "tensorrt is not installed here, and tensorrt-rtx takes no plugin from Python",
    )
    model, why = report._fused(resolve(colour_onnx), tmp_path, [rtx, tensorrt])
    assert model is None
    assert why == f"{colour_onnx.stem} must be exported anew for it, and torch or its checkpoint is missing"


def test_exit_codes(report: ModuleType) -> None:
    good = RESULT | {"rows": RESULT["rows"][:1]}
    assert report.exit_code(good) == 0
    assert report.exit_code(RESULT) == 1  # one row stopped
    assert report.exit_code(good | {"tests": {"exit_code": 1}}) == 1
    assert report.exit_code(good | {"tests": {"skipped": "by --no-tests"}}) == 0
    assert report.exit_code(good | {"rows": [row(within=False)]}) == 3
