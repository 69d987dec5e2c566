"""Batches on a real Ray with two worker processes, whose outputs are the local engine's, whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from ray_processes import worker_processes

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.listing import MANIFEST_NAME
from ddsm_deploy.ray.options import RayOptions
from ddsm_deploy.ray.run import RaySummary, segment_on_ray
from ddsm_deploy.runtime.outputs import Products
from ddsm_deploy.runtime.pipeline import SegmentSummary, open_for_batch, segment_files
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.worker import SegmentOptions

# Ray warns of its own options, and leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

PRODUCTS = Products(color=True, confidence=True, polygons="geojson")


@pytest.fixture(scope="module")
def segmenter(colour_onnx: Path) -> Iterator[Segmenter]:
    with open_for_batch(colour_onnx, backend="onnxruntime", outputs=("mask", "confidence")) as opened:
        yield opened


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """40 frames in two folders, and a damaged one."""
    folder = tmp_path / "frames"
    for index in range(40):
        path = folder / ("deep" if index % 4 == 0 else "") / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), cv2.resize(noise, (300, 200)))
    (folder / "damaged.png").write_bytes((folder / "01.png").read_bytes()[:200])
    return folder


def on_ray(
    source: object, output: object, segmenter: Segmenter, *, progress: Callable | None = None, **given
) -> RaySummary:
    options = RayOptions(output=str(output), **{"workers": 2, "threads": 1, "batch": 4, **given})
    return segment_on_ray([str(source)], segmenter, options, progress=progress)


def locally(source: Path, output: Path, segmenter: Segmenter, **given) -> SegmentSummary:
    return segment_files([source], segmenter, SegmentOptions(output=output, **given))


def contents(output: Path) -> dict[str, bytes]:
    """All outputs; the manifest is no output."""
    files = (path for path in output.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(output).as_posix(): path.read_bytes() for path in files}


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / MANIFEST_NAME).read_text().splitlines()]


class Killer:
    """Kills one worker, the first time that frames are done."""

    killed: int | None = None

    def __call__(self, summary: SegmentSummary) -> None:
        if summary.done and self.killed is None:
            self.killed = worker_processes()[0]
            os.kill(self.killed, signal.SIGKILL)


def test_a_worker_is_killed_and_each_output_is_there_once(
    cluster: str, tmp_path: Path, frames: Path, segmenter: Segmenter
) -> None:
    locally(frames, tmp_path / "local", segmenter, products=PRODUCTS)
    killer = Killer()
    summary = on_ray(frames, tmp_path / "ray", segmenter, products=PRODUCTS, progress=killer)
    assert killer.killed
    assert (summary.found, summary.done, summary.workers, summary.threads) == (41, 40, 2, 1)
    (failure,) = summary.failures
    assert failure.source == str(frames / "damaged.png")
    assert "truncated" in failure.error
    assert contents(tmp_path / "ray") == contents(tmp_path / "local")
    header, *rest = records(tmp_path / "ray")
    assert header == records(tmp_path / "local")[0]
    assert len(rest) == 41
    assert {record["source"] for record in rest} == {str(path) for path in frames.rglob("*.png")}


def test_a_batch_that_kills_too_often_fails_alone(
    cluster: str, tmp_path: Path, frames: Path, segmenter: Segmenter
) -> None:
    (frames / "damaged.png").unlink()
    killer = Killer()
    summary = on_ray(frames, tmp_path / "out", segmenter, workers=1, retries=0, progress=killer)
    assert killer.killed
    assert 0 < len(summary.failures) < 40
    assert summary.done == 40 - len(summary.failures)
    assert summary.processes == 2
    assert all("its worker process died 1 times" in failure.error for failure in summary.failures)
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) >= summary.done


def test_runs_go_on_where_either_engine_stopped(
    cluster: str, tmp_path: Path, frames: Path, segmenter: Segmenter
) -> None:
    (frames / "damaged.png").unlink()
    out = tmp_path / "out"
    assert on_ray(frames, out, segmenter).done == 40
    assert locally(frames, out, segmenter).skipped == 40
    (out / "masks" / "01.png").unlink()
    (frames / "02.png").write_bytes((frames / "03.png").read_bytes())
    summary = on_ray(frames, out, segmenter)
    assert (summary.done, summary.skipped) == (2, 38)
    assert (out / "masks" / "02.png").read_bytes() == (out / "masks" / "03.png").read_bytes()
    assert on_ray(frames, out, segmenter).processes == 0, "nothing to do, and no worker for it"
    frames.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="holds the outputs of"):
        on_ray(tmp_path / "moved", out, segmenter)


def test_the_command_joins_a_cluster_and_leaves_it(
    cluster: str, tmp_path: Path, frames: Path, colour_onnx: Path
) -> None:
    import ray

    command = [sys.executable, "-m", "ddsm_deploy", "segment", str(frames), "-o", "out", "-m", str(colour_onnx)]
    command += ["--backend", "onnxruntime", "--json", "-"]
    command += ["--engine", "ray", "--address", cluster, "--workers", "2", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 1, done
    facts = json.loads(done.stdout)
    assert (facts["found"], facts["done"], facts["failed"], facts["workers"]) == (41, 40, 1, 2)
    failed, summary = (line for line in done.stderr.splitlines() if " frames, " not in line)  # which show progress
    assert failed.startswith(f"failed: {frames}/damaged.png: truncated")
    assert summary.startswith("41 frames: 40 done, 1 failed, 0 skipped; ")
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == 40
    assert ray.cluster_resources()["CPU"] >= 2, "the cluster lives on"


def test_a_model_that_no_worker_can_open_ends_the_run(
    cluster: str, tmp_path: Path, frames: Path, colour_onnx: Path
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(colour_onnx.read_bytes())
    with open_for_batch(model, backend="onnxruntime") as segmenter:
        altered = onnx.load(model)
        del altered.metadata_props[:]  # whole, but no longer one of ours
        onnx.save(altered, model)
        with pytest.raises(BackendError, match=r"a worker can't run the model: .*model\.onnx"):
            on_ray(frames, tmp_path / "out", segmenter)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"address": "ray://head:10001"}, "expected HOST:PORT"),
        ({"products": Products(polygons="coco")}, "ray makes no COCO file"),
    ],
)
def test_options_are_checked(given: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RayOptions(output="out", **given)


def test_more_threads_than_any_machine_has_cores(
    cluster: str, tmp_path: Path, frames: Path, segmenter: Segmenter
) -> None:
    with pytest.raises(ConfigError, match="999 threads, and no machine of the cluster has more than"):
        on_ray(frames, tmp_path / "out", segmenter, threads=999)


def test_no_cluster_there(tmp_path: Path, frames: Path, colour_onnx: Path, need) -> None:
    need("ray")
    command = [sys.executable, "-m", "ddsm_deploy", "segment", str(frames), "-o", str(tmp_path / "out"), "-m"]
    command += [str(colour_onnx), "--backend", "onnxruntime", "--engine", "ray", "--address", "127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ddsm: no Ray cluster can be reached at 127.0.0.1:9 (")
