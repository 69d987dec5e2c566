"""`ddsm segment` with videos and recordings."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from recordings import mask_of, picture, write_bag, write_video


@pytest.fixture(autouse=True)
def _packages(need) -> None:
    for module in ("rosbags", "av", "onnxruntime"):
        need(module)


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "ddsm_deploy", "segment", *map(str, args)]


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120)


@pytest.fixture
def drive(tmp_path: Path) -> Path:
    write_bag(tmp_path / "drive", [(i, b"short" if i == 2 else picture(i)) for i in range(6)])
    return tmp_path / "drive"


def test_a_recording_to_everything(colour_onnx: Path, drive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    base = (drive, "-o", output, "-m", colour_onnx, "--backend", "onnxruntime")
    done = run(*base, "--bag", "--jsonl", "--video", "--color", "--json", "-")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["done"], summary["damaged"], summary["dropped"], summary["count"]) == (5, 1, 0, 6)
    assert "damaged: frame 2: 5 bytes" in done.stderr and "5 done, 1 damaged" in done.stderr
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    assert names == ["bag", "color", "ddsm-stream.json", "frames.jsonl", "masks", "overlay.mp4"]
    mask = cv2.imread(str(output / "masks" / "00000004.png"), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(mask, mask_of(picture(4)))
    again = run(*base, "--bag", "--jsonl", "--video", "--color")
    assert again.returncode == 0 and "0 done, 0 damaged, 0 dropped, 6 before" in again.stdout


def test_a_video_and_a_folder_to_a_video(colour_onnx: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", [picture(i) for i in range(4)])
    (tmp_path / "frames").mkdir()
    for index in range(4):
        cv2.imwrite(str(tmp_path / "frames" / f"{index}.png"), picture(index))
    for source in ("a.mkv", "frames"):
        output = tmp_path / f"out-{source}"
        done = run(tmp_path / source, "-o", output, "-m", colour_onnx, "--video", "--no-masks", "--max-frames", 3)
        assert done.returncode == 0, done.stderr
        assert [p.name for p in output.iterdir() if not p.name.startswith(".")] != []
        capture = cv2.VideoCapture(str(output / "overlay.mp4"))
        count = 0
        while capture.read()[0]:
            count += 1
        assert count == 3 and not (output / "masks").exists()


def test_what_does_not_go_together(colour_onnx: Path, drive: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cases = {
        "one stream at a time": (drive, tmp_path),
        "no image topic": (drive, "--topic", "/none"),
        "nothing to write": (drive, "--no-masks"),
        "are a stream with --video, --bag": (tmp_path, "--policy", "latest"),
        "policy is 'newest'": (drive, "--policy", "newest"),
    }
    for says, args in cases.items():
        done = run(*args, "-o", output, "-m", colour_onnx)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, (says, done.stderr)


def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(colour_onnx: Path, tmp_path: Path) -> None:
    write_bag(tmp_path / "drive", [(i, picture(i, (480, 640))) for i in range(120)])
    output = tmp_path / "out"
    args = (tmp_path / "drive", "-o", output, "-m", colour_onnx, "--backend", "onnxruntime", "--jsonl", "--overlay")
    child = subprocess.Popen(command(*args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (output / "masks" / "00000002.png").exists():
            time.sleep(0.005)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "run the same command again" in said and "Traceback" not in said, said
    done = run(*args)
    assert done.returncode == 0, done.stderr
    indices = [json.loads(line)["index"] for line in (output / "frames.jsonl").read_text().splitlines()]
    assert indices == list(range(120))


def test_threads_are_those_of_the_network_where_only_the_latest_frame_counts(shipped_model: Path) -> None:
    from ddsm_deploy.cli.stream import _opened_for_latency

    opened = {"model": shipped_model, "backend": "onnxruntime", "fit": "stretch", "fresh": False}
    opened |= {"precision": None, "outputs": ("mask",), "provider": "cpu", "sampling": None}
    with _opened_for_latency(opened, 1) as segmenter:
        assert segmenter.options.threads == 1
