"""`ddsm bundle`, run as the command that a user types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from colour_graph import write_colour_model
from painted_graph import paint, write_painted


def ddsm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "ddsm_deploy", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False, timeout=120)


def test_a_bundle_that_opens(tiny_files: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "tiny.zip"
    done = ddsm("bundle", output, *tiny_files.values(), "--name", "mine", "--json", "-")
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert (fields["name"], fields["path"]) == ("mine", str(output))
    assert len(fields["artifacts"]) == len(tiny_files)
    for line in ("model.onnx", "model.int8.openvino.onnx", "onnx int8 for openvino", "onnx fp16", "checkpoint fp32"):
        assert line in done.stderr
    shown = ddsm("info", output)
    assert shown.returncode == 0
    assert "onnx int8 for openvino" in shown.stdout
    assert "weights in model.weights)" in shown.stdout


def test_a_file_that_stands_alone(tmp_path: Path) -> None:
    model = write_painted(tmp_path / "a.onnx", paint(1))
    assert ddsm("bundle", tmp_path / "b", model).returncode == 0
    alone = tmp_path / "alone.onnx"
    done = ddsm("bundle", alone, tmp_path / "b" / "model.onnx", "--json", "-")
    assert (done.returncode, done.stderr) == (0, f"{alone}: 0.0 MB, self-contained\n")
    assert json.loads(done.stdout) == {"path": str(alone), "bytes": model.stat().st_size}
    assert alone.read_bytes() == model.read_bytes()
    assert ddsm("bundle", alone, model, model).returncode == 2


def test_errors_are_one_line(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "a.onnx")
    for arguments, said in (
        ((tmp_path / "b", tmp_path / "none.onnx"), "No such file"),
        ((model, model), "is a file"),
    ):
        done = ddsm("bundle", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr
    assert ddsm("bundle", tmp_path / "b").returncode == 2  # no file named
