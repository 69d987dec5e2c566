"""`ddsm segment` as a user meets it: exit codes, one clear line an error, and no traceback, whatever comes in."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

COMMAND = [sys.executable, "-c", "from ddsm_deploy.cli import main; main()", "segment"]
MANIFEST = "ddsm-manifest.jsonl"


def picture(seed: int, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    return cv2.resize(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8), size[::-1])


def encoded(suffix: str, seed: int = 0) -> bytes:
    return cv2.imencode(suffix, picture(seed))[1].tobytes()


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.png").write_bytes(encoded(".png", index))
    return folder


def ddsm(*arguments: object, model: Path | None = None) -> subprocess.CompletedProcess[str]:
    chosen = [] if model is None else ["--model", model, "--backend", "onnxruntime"]
    command = [*COMMAND, *map(os.fspath, arguments), *map(os.fspath, chosen)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of stderr, of a run that an error ended."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: ")
    return line


def left_overs(output: Path) -> list[Path]:
    return list(output.rglob("*.part"))


def test_a_run_and_its_summary(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    done = ddsm(frames, "-o", out, "--color", "--overlay", "--confidence", "--json", report, model=colour_onnx)
    assert done.returncode == 0, done
    assert done.stdout.startswith("4 frames: 4 done, 0 failed, 0 skipped; ")
    assert f"results in {out}" in done.stdout
    assert "onnxruntime" in done.stdout
    assert done.stderr == ""
    for product in ("masks", "color", "confidence"):
        assert sorted(p.name for p in (out / product).iterdir()) == ["0.png", "1.png", "2.png", "3.png"]
    facts = json.loads(report.read_text())
    assert (facts["found"], facts["done"], facts["failed"], facts["skipped"]) == (4, 4, 0, 0)
    assert (facts["backend"], facts["precision"], facts["sampling"]) == ("onnxruntime", "fp32", "portable")

    again = ddsm(frames, "-o", out, "--json", "-", model=colour_onnx)
    assert again.returncode == 0
    assert json.loads(again.stdout)["skipped"] == 4, "standard output holds the JSON alone"
    assert "4 skipped" in again.stderr


def test_quoted_globs_and_quiet(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    done = ddsm(f"{frames.parent}/**/[12].png", "-o", tmp_path / "out", "--quiet", model=colour_onnx)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.png")) == ["1.png", "2.png"]


def test_bad_images_among_good_ones(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    """Each gets one line; the native decoders' own messages stay away, and the good images are done."""
    damaged = bytearray(encoded(".png"))
    damaged[len(damaged) // 2 : len(damaged) // 2 + 30] = bytes(30)
    bad = {
        "cut.png": encoded(".png")[:200],
        "cut.jpg": encoded(".jpg")[:-20],
        "inside.png": bytes(damaged),
        "empty.png": b"",
        "text.png": b"these are words, not pixels",
        "cut.bmp": encoded(".bmp")[:500],
        "cut.tif": encoded(".tif")[:500],
        "cut.webp": encoded(".webp")[:200],
    }
    for name, data in bad.items():
        (frames / name).write_bytes(data)
    (frames / "dangling.png").symlink_to(tmp_path / "nowhere")
    (frames / "large.png").write_bytes(cv2.imencode(".png", picture(0, (300, 400)))[1].tobytes())
    (frames / "folder.png").mkdir()
    (frames / "folder.png" / "fine.png").write_bytes(encoded(".png", 9))

    out, report = tmp_path / "out", tmp_path / "report.json"
    done = ddsm(frames, "-o", out, "--max-pixels", "100000", "--json", report, model=colour_onnx)
    assert done.returncode == 1
    assert done.stdout.startswith("15 frames: 5 done, 10 failed, 0 skipped; ")
    lines = done.stderr.splitlines()
    assert len(lines) == 10
    assert all(line.startswith(f"failed: {frames}") for line in lines)
    for name in (*bad, "dangling.png", "large.png"):
        assert sum(f"/{name}: " in line for line in lines) == 1, name
    assert {Path(f["source"]).name for f in json.loads(report.read_text())["failures"]} == {
        *bad,
        "dangling.png",
        "large.png",
    }
    assert not left_overs(out)
    masks = [p.relative_to(out / "masks").as_posix() for p in (out / "masks").rglob("*.png") if p.is_file()]
    assert sorted(masks) == ["0.png", "1.png", "2.png", "3.png", "folder.png/fine.png"]


def test_a_jpeg_damaged_inside_is_decoded_and_noted(tmp_path: Path, colour_onnx: Path) -> None:
    """JPEG has no checksum: libjpeg shows what it can and warns on stderr, which must not run into our own lines."""
    data = bytearray(
        cv2.imencode(".jpg", np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8))[1].tobytes()
    )
    data[len(data) // 2] ^= 0x55
    (tmp_path / "a.jpg").write_bytes(bytes(data))
    done = ddsm(tmp_path / "a.jpg", "-o", tmp_path / "out", model=colour_onnx)
    assert done.returncode == 0
    for line in done.stderr.splitlines():
        assert line.startswith("note: image decoders warned 1 times, most often: Corrupt JPEG data"), line


def test_names_at_the_limit_of_the_file_system(tmp_path: Path, colour_onnx: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / os.fsdecode(b"out \xff")
    folder.mkdir()
    for name in ("n" * 251, "日本語の名前🚗", os.fsdecode(b"not unicode \xff"), "two\nlines"):
        (folder / f"{name}.png").write_bytes(encoded(".png"))
    (folder / "bad\nname.png").write_bytes(b"")
    done = ddsm(folder, "-o", out, "--polygons", "coco", "--overlay", model=colour_onnx)
    assert done.returncode == 1, done
    assert done.stderr == f"failed: {folder}/bad name.png: the file is empty\n"
    assert len(list((out / "masks").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing", "-o", "out"], "missing: no such file or folder"),
        (["empty", "-o", "out"], "empty: no image there"),
        (["frames", "-o", "file/below"], "can't be the output folder"),
        (["frames", "-o", "file"], "it is a file"),
        (["frames", "-o", "out", "--polygons", "svg"], "expected geojson or coco"),
        (["frames", "-o", "out", "--fit", "crop"], "expected stretch or letterbox"),
        (["frames", "-o", "out", "--precision", "fp8"], "precision"),
        (["frames", "-o", "out", "--sampling", "gather"], "sampling"),
        (["frames", "-o", "/proc/nowhere"], "can't be the output folder"),
    ],
)
def test_what_can_not_start_says_why(
    tmp_path: Path, frames: Path, colour_onnx: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    paths = [
        str(tmp_path / a) if a.split("/")[0] in ("missing", "empty", "frames", "out", "file") else a for a in arguments
    ]
    assert said in one_line(ddsm(*paths, model=colour_onnx))


def test_models_that_are_none(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    whole = colour_onnx.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    foreign = onnx.load(str(colour_onnx))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(tmp_path / "foreign.onnx"))
    outside = onnx.load(str(colour_onnx))
    weight = helper.make_tensor("stolen", TensorProto.UINT8, [4], b"\0" * 4, raw=True)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")
    outside.graph.initializer.append(weight)
    (tmp_path / "outside.onnx").write_bytes(outside.SerializeToString())
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("cut", "foreign", "outside", "text", "missing"):
        line = one_line(ddsm(frames, "-o", tmp_path / "out", model=tmp_path / f"{name}.onnx"))
        assert f"{name}.onnx" in line
    assert not (tmp_path / "out").exists()


def test_another_model_in_the_same_folder(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    from colour_graph import write_colour_model

    assert ddsm(frames, "-o", tmp_path / "out", model=colour_onnx).returncode == 0
    other = write_colour_model(tmp_path / "other.onnx", size=(32, 48))
    line = one_line(ddsm(frames, "-o", tmp_path / "out", model=other))
    assert "was made otherwise" in line
    assert "--overwrite" in line
    assert ddsm(frames, "-o", tmp_path / "out", "--overwrite", model=other).returncode == 0


def test_wrong_usage() -> None:
    assert ddsm("frames").returncode == 2
    assert ddsm("frames", "-o", "out", "--threads", "0").returncode == 2


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """120 inputs that take tens of milliseconds each: enough to be interrupted among them."""
    folder = tmp_path / "many"
    folder.mkdir()
    noisy = np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "000.png"), noisy)
    for index in range(1, 120):
        (folder / f"{index:03}.png").symlink_to(folder / "000.png")
    return folder


def started(source: Path, out: Path, model: Path) -> subprocess.Popen[str]:
    """A run that has finished at least five frames and has far to go."""
    arguments = [source, "-o", out, "--model", model, "--backend", "onnxruntime", "--color"]
    command = [*COMMAND, *map(os.fspath, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / MANIFEST).exists() and (out / MANIFEST).read_bytes().count(b"\n") > 5:
            return process
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate())


def check_kept_and_resumed(source: Path, out: Path, model: Path) -> None:
    """Every visible output is whole, and the same command makes the rest."""
    visible = [*out.rglob("*.png")]
    assert visible
    for path in visible:
        assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape[:2] == (500, 700)
    recorded = sum(
        '"error"' not in line for line in (out / MANIFEST).read_text().splitlines()[1:] if line.endswith("}")
    )
    assert 5 <= recorded < 120
    done = ddsm(source, "-o", out, "--color", "--json", "-", model=model)
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert facts["skipped"] >= 5
    assert facts["done"] + facts["skipped"] == 120
    assert not left_overs(out)
    assert len(list((out / "masks").iterdir())) == len(list((out / "color").iterdir())) == 120


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, many: Path, colour_onnx: Path) -> None:
    out = tmp_path / "out"
    process = started(many, out, colour_onnx)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "interrupted; run the same command again to go on" in stderr
    assert " left; " in stdout
    assert not left_overs(out)
    masks = {path.name for path in (out / "masks").iterdir()}
    listed = {Path(json.loads(line)["source"]).name for line in (out / MANIFEST).read_text().splitlines()[1:]}
    assert listed == masks, "the manifest tells of exactly what is there"
    check_kept_and_resumed(many, out, colour_onnx)


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path, many: Path, colour_onnx: Path) -> None:
    out = tmp_path / "out"
    process = started(many, out, colour_onnx)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    check_kept_and_resumed(many, out, colour_onnx)


def test_a_disk_quota_ends_the_run_in_one_line(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    """A limit on the size of files stands in for a disk that takes no more, also where nothing can be mounted."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); from ddsm_deploy.cli import main; main()"
    out = tmp_path / "out"
    arguments = [frames, "-o", out, "--model", colour_onnx, "--backend", "onnxruntime", "--color", "--overlay"]
    command = [sys.executable, "-c", limited, "segment", *map(os.fspath, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not left_overs(out)
    for line in (out / MANIFEST).read_text().splitlines():
        json.loads(line)


def test_the_bar_on_a_terminal(tmp_path: Path, frames: Path, colour_onnx: Path) -> None:
    ours, theirs = pty.openpty()
    arguments = [frames, "-o", tmp_path / "out", "--model", colour_onnx, "--backend", "onnxruntime"]
    command = [*COMMAND, *map(os.fspath, arguments)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, timeout=120, check=False)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "4/4" in shown
    assert "FPS" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--workers", "2"], "--workers, --batch and --address are options of --engine ray"),
        (["--engine", "cloud"], "engine is 'cloud'; expected local or ray"),
        (["--engine", "ray", "--video"], "options of streams don't go with --engine ray"),
        (["drive.mp4", "--engine", "ray"], "drive.mp4 is a stream, and --engine ray takes images"),
        (
            ["s3://bucket/day1"],
            "s3://bucket/day1: the local engine takes files of this machine alone",
        ),
        (["-o", "gs://bucket/out"], "gs://bucket/out: the local engine"),
    ],
)
def test_what_does_not_go_with_an_engine(frames: Path, tmp_path: Path, words: list[str], told: str) -> None:
    assert told in one_line(ddsm(frames, "-o", tmp_path / "out", *words))


def test_ray_is_not_installed(frames: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from ddsm_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "segment", str(frames), "-o", str(tmp_path / "out"), "--engine", "ray"]
    line = one_line(subprocess.run(command, capture_output=True, text=True, timeout=120, check=False))
    assert line.startswith("ddsm: ray is not usable here (")
    assert line.endswith("install it with: pip install 'ddsm-deploy[ray]'")
