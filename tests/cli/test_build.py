"""`ddsm build` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ddsm_deploy.enginefile import read_engine


def ddsm(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "ddsm_deploy", "build", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=folder, timeout=240)


def test_a_build(tiny_onnx: Path, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    done = ddsm(tiny_onnx, "--target", "tensorrt-rtx", "--precision", "fp16", "--json", "out.json", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    name = "tiny.fp16.tensorrt-rtx.engine"
    assert done.stdout.startswith(f"{name}: ")
    assert done.stdout.count("\n") == 1
    for text in ("fp16", "compute capability 80, 86, 89, 120", "Conv Half", "% of the pixels differ", "Engine: "):
        assert text in done.stdout
    record = read_engine(tmp_path / name)
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["record"] == json.loads(record.to_json())
    assert result["parity"]["passed"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", name, f"{name}.json"]


def test_json_on_standard_output(tiny_onnx: Path, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    done = ddsm(
        tiny_onnx, "--target", "tensorrt-rtx", "-o", "a/b.engine", "--compute-capability", "8.6", "--json", "-",
        "--no-verify", folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["compute_capabilities"] == ["86"]
    assert done.stderr.startswith("a/b.engine: ")
    assert (tmp_path / "a" / "b.engine.json").is_file()


def test_errors_are_one_line(tiny_onnx: Path, tmp_path: Path, need, missing) -> None:
    need("tensorrt_rtx")
    rtx = ("--target", "tensorrt-rtx")
    cases: list[tuple[list[str | Path], str]] = [
        ([tiny_onnx, "--target", "onnx"], "target is 'onnx'; expected tensorrt or tensorrt-rtx"),
        ([tiny_onnx, *rtx, "--precision", "int8"], f"make one with: ddsm quantize {tiny_onnx} --calibration DIR"),
        ([tiny_onnx, *rtx, "--profile", "1x2x3"], "expected MIN:OPT:MAX"),
        ([tiny_onnx, *rtx, "--dla-core", "0"], "has no option 'dla core': it runs on RTX GPUs, and those have no DLA"),
        ([tiny_onnx, *rtx, "--compute-capability", "75"], "build it with --precision fp16, or leave 75 out"),
        ([tmp_path / "none.onnx", *rtx], "No such file"),
        ([tiny_onnx, *rtx, "-o", "b.onnx"], "expected a name that ends in .engine"),
        ([tiny_onnx, *rtx, "-o", "b.engine", "--json", "b.engine.json"], "is the engine's own"),
    ]
    import importlib.util

    if importlib.util.find_spec("tensorrt") is None:
        cases.append(([tiny_onnx, "--target", "tensorrt"], "pip install 'ddsm-deploy[tensorrt]'"))
    for arguments, said in cases:
        done = ddsm(*arguments, folder=tmp_path)
        assert done.returncode == 1, (arguments, done.stderr)
        assert done.stderr.startswith("ddsm: ")
        assert done.stderr.count("\n") == 1
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_failed_gate_is_exit_code_3(shipped_model: Path, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    strict = ["--precision", "int8", "--max-changed", "0"]  # INT8 changes some pixels on any processor
    done = ddsm(shipped_model, "--target", "tensorrt-rtx", *strict, folder=tmp_path)
    assert done.returncode == 3
    assert "not written; the int8 graph is too far" in done.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing_behind(shipped_model: Path, tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    command = [
        sys.executable,
        "-m",
        "ddsm_deploy",
        "build",
        str(shipped_model),
        "--target",
        "tensorrt-rtx",
        "--no-verify",
    ]
    process = subprocess.Popen([*command, "-o", "x.engine"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".x.engine.*.part")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "ddsm: interrupted\n")
    assert not list(tmp_path.iterdir())
