"""`ddsm export` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ddsm_deploy.export import ExportReport
from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from ddsm_deploy.spec import NetworkConfig

# one interpreter for many command lines, because loading torch takes seconds
SEVERAL = """
import json, sys
from ddsm_deploy.cli import main
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    try:
        main()
        code = 0
    except SystemExit as exc:
        code = exc.code or 0
    sys.stdout.flush()
    print(f"exit {code}", file=sys.stderr, flush=True)
"""


def several(*lines: list[str]) -> list[tuple[int, str]]:
    """Exit code and standard error of each command line."""
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL], input=json.dumps(lines), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    answers, text = [], ""
    for line in done.stderr.splitlines():
        if line.startswith("exit "):
            answers.append((int(line.split()[1]), text.strip()))
            text = ""
        else:
            text += line + "\n"
    return answers


@pytest.mark.timeout(1200)
def test_same_checkpoint_same_bytes(
    exported: Callable[..., ExportReport], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Another process in another folder, told by the command line, writes the very file that the library wrote."""
    want = exported("ddsm", half=True, weights="fp16", outputs=("mask", "logits", "confidence"))
    command = [
        sys.executable,
        "-m",
        "ddsm_deploy",
        "export",
        str(checkpoint("ddsm", half=True)),
        "-o",
        "made/model.onnx",
    ]
    command += ["--logits", "--confidence", "--weights", "fp16", "--size", "64x96", "--json", "report.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("made/model.onnx: ")
    assert done.stdout.count("\n") == 1  # nothing of the exporter's own chatter
    assert "of the pixels equal torch's" in done.stdout

    assert (tmp_path / "made" / "model.onnx").read_bytes() == want.path.read_bytes()
    fields = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (fields["sha256"], fields["bytes"]) == (want.sha256, want.bytes)
    assert fields["parity"]["passed"] is True
    assert 0 <= fields["parity"]["changed"] <= 0.1
    assert fields["spec"]["classes"] == list("abcdefghijk")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["model.onnx"]


def test_bad_input(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    good = checkpoint("add")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-1000])
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    other = tmp_path / "other.safetensors"
    network, spec = load_checkpoint(good)
    save_checkpoint(other, network, spec.replace(network=NetworkConfig(**{**vars(spec.network), "channels": 25})))
    small = tmp_path / "small.safetensors"
    save_checkpoint(small, network, spec.replace(height=16))
    text = tmp_path / "notes.txt"
    text.write_text("no folder", encoding="utf-8")
    out = tmp_path / "out"

    cases: list[tuple[list[str | Path], str]] = [
        ([tmp_path / "missing.safetensors"], "missing.safetensors: "),
        ([cut], "cut.safetensors: "),
        ([empty], "empty.safetensors: "),
        ([text], "notes.txt: not a model"),
        (["no-such-model"], "no model 'no-such-model'"),
        ([other], "other.safetensors: a checkpoint of another architecture"),
        ([small], "16x96; expected at least 32x32"),
        ([good, "--size", "31x400"], "31x400; expected at least 32x32"),
        ([good, "--size", "big"], "expected HEIGHTxWIDTH"),
        ([good, "--dynamic", "size"], "expected one of: none | batch | batch,size"),
        ([good, "--sampling", "nearest"], "expected one of: portable | fused | gather"),
        ([good, "--sampling", "fused", "--precision", "fp16", "--grid", "fp16"], "fused sampling computes in float32"),
        ([good, "--channel-order", "grb"], "expected one of: bgr | rgb"),
        ([good, "--weights", "int4"], "expected one of: fp32 | fp16"),
        ([good, "--verify-images", tmp_path / "nowhere"], "nowhere: no such file or folder"),
        ([good, "--verify-images", tmp_path, "--no-verify"], "drop one of the two"),
        ([good, "-o", tmp_path], "is a folder"),
        ([good, "-o", text / "model.onnx"], "model.onnx: can't be written"),
    ]
    lines = [["export", "-o", str(out / "model.onnx"), *map(str, arguments)] for arguments, _ in cases]
    answers = several(*lines)
    assert len(answers) == len(cases)
    for (arguments, expected), (code, message) in zip(cases, answers, strict=True):
        assert code == 1, (arguments, message)
        assert message.startswith("ddsm: "), arguments
        assert "\n" not in message, arguments
        assert expected in message
    assert not list(out.glob("*"))
