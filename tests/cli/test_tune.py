"""`ddsm tune`, run as the command that a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from colour_graph import write_colour_model


def ddsm(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ddsm_deploy", *map(str, arguments)]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_it_is_shown_kept_and_used(tmp_path: Path, need) -> None:
    need("openvino")
    model, cache = write_colour_model(tmp_path / "model.onnx"), tmp_path / "cache"
    done = ddsm("tune", model, "--seconds", "0.05", "--json", tmp_path / "tune.json", cache=cache)
    assert done.returncode == 0, done.stderr
    fields = json.loads((tmp_path / "tune.json").read_text())
    best = fields["rows"][fields["best"]]
    for text in ("p50", "p99", "FPS", "changed", "onnxruntime fp32 spinning=False", "openvino fp32", fields["kept"]):
        assert text in done.stdout
    assert f"best: {best['backend']} {best['precision']}" in done.stdout

    shown = ddsm("info", model, "--json", tmp_path / "info.json", cache=cache)
    assert "auto for latency, tuned" in shown.stdout
    (decision,) = json.loads((tmp_path / "info.json").read_text())["decisions"]
    assert decision["kept_in"] == fields["kept"]
    assert decision["tuned"] is True
    assert len(decision["trials"]) == len(fields["rows"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--for", "speed"), "the goal is 'speed'; expected latency or throughput"),
        (("--seconds", "0"), "the time is 0.0 seconds; expected more than 0"),
        (("--images", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, str], words: str) -> None:
    done = ddsm("tune", write_colour_model(tmp_path / "model.onnx"), *arguments, cache=tmp_path / "cache")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    assert words in line
