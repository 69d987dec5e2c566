"""`ddsm deploy`, run as the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from colour_graph import write_colour_model


@pytest.fixture(autouse=True)
def _tritonclient(need) -> None:
    need("tritonclient")


def ddsm(*arguments: str | Path, limit: str = "unlimited") -> subprocess.CompletedProcess[str]:
    """Runs the command; `limit` is the largest file that it may write, in `ulimit`'s unit."""
    command = [sys.executable, "-W", "error", "-m", "ddsm_deploy", "deploy", *map(str, arguments)]
    limited = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "bash", *command]
    return subprocess.run(limited, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)


def test_what_it_says(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "colours.onnx")
    options = ("-o", tmp_path / "models", "--name", "street", "--threads", "2", "--instances", "2")
    done = ddsm("triton", model, *options)
    assert done.returncode == 0, done.stderr
    file = tmp_path / "models" / "street" / "1" / "model.onnx"
    assert done.stdout.splitlines() == [
        f"{file}: fp32 on onnxruntime, cpu, 8x12 bgr, one image a time, 2 instances a device; model street, version 1",
        "note: its batch is fixed at 1, so Triton runs one request a time and batches nothing "
        "(open it with: ddsm export CKPT --dynamic batch)",
    ]
    done = ddsm("triton", model, *options, "--new-version", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert "model street, version 2" in done.stderr
    result = json.loads(done.stdout)
    assert (result["version"], result["max_batch"], result["spec"]["name"]) == (2, 0, "colours")
    assert result["file"] == str(tmp_path / "models" / "street" / "2" / "model.onnx")


def test_errors_are_one_line(tmp_path: Path) -> None:
    done = ddsm("triton", tmp_path / "none.onnx", "-o", tmp_path / "models")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "can't be read" in done.stderr
    assert ddsm("triton").returncode == 2  # no repository named


def test_a_disk_that_takes_half_of_it_leaves_what_was_there(shipped_model: Path, tmp_path: Path) -> None:
    small = write_colour_model(tmp_path / "street.onnx")
    repository = tmp_path / "models"
    assert ddsm("triton", small, "-o", repository).returncode == 0
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
    for name in ("street", "other"):
        done = ddsm("triton", shipped_model, "-o", repository, "--name", name, "--overwrite", limit="1000")  # 1 of 3 MB
        assert done.returncode == 1
        assert done.stderr == f"ddsm: {repository / name}: can't be written (File too large)\n"
        assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
        assert [path.name for path in repository.iterdir()] == ["street"]
