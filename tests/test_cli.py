"""The command line as a user meets it: help, version, exit codes, Ctrl-C, closed pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from colour_graph import write_colour_model

DDSM = [sys.executable, "-m", "ddsm_deploy"]


def ddsm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DDSM, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_help_names_every_command() -> None:
    done = ddsm("--help")
    assert done.returncode == 0
    for command in ("train", "export", "segment", "eval", "bench", "info"):
        assert f"\n  {command} " in done.stdout


def test_version() -> None:
    done = ddsm("--version")
    assert (done.returncode, done.stdout) == (0, f"ddsm-deploy {version('ddsm-deploy')}\n")


def test_the_installed_command_is_the_same_program() -> None:
    script = Path(sys.executable).with_name("ddsm")
    assert script.is_file(), "the package is not installed in this environment: pip install -e '.[dev]'"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout == ddsm("--version").stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("segment",), ("info", "--nonsense")], ids=" ".join)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    done = ddsm(*arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_made_on_purpose_is_one_line_and_exits_with_1(tmp_path: Path) -> None:
    done = ddsm("info", tmp_path / "missing.onnx")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ddsm: ")
    assert done.stderr.count("\n") == 1
    assert "missing.onnx" in done.stderr


def test_a_line_break_in_a_name_does_not_break_the_line(tmp_path: Path) -> None:
    done = ddsm("info", tmp_path / "two\nlines.onnx")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_ctrl_c_exits_with_130(tmp_path: Path) -> None:
    # a bundle whose record is a pipe: opening the pipe's other end waits until the command reads it, so that the signal
    # comes in the middle of its work, on any machine
    pipe = tmp_path / "bundle.json"
    os.mkfifo(pipe)
    with (
        subprocess.Popen(
            [*DDSM, "info", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run,
        pipe.open("w"),
    ):
        run.send_signal(signal.SIGINT)
        output, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert output == ""
    assert errors == "ddsm: interrupted\n"


@pytest.mark.parametrize("arguments", [("--help",), ("info", "MODEL")], ids=["help", "info"])
def test_a_reader_that_goes_away_ends_it_quietly(arguments: tuple[str, ...], tmp_path: Path) -> None:
    model = str(write_colour_model(tmp_path / "model.onnx"))
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads, as after `| head` has had enough
    command = [*DDSM, *(model if word == "MODEL" else word for word in arguments)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
