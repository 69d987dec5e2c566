"""The benchmark with real backends in real processes: its figures, its order, and what becomes of failures."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from colour_graph import write_colour_model

from ddsm_deploy import kernels
from ddsm_deploy.errors import ArtifactError, ConfigError, InputError
from ddsm_deploy.evaluate.benchmark import MAX_IMAGES, ROUND, BenchOptions, Row, Worker, bench, list_images
from ddsm_deploy.evaluate.machine import machine_facts
from ddsm_deploy.evaluate.worker import Task

FIGURES = ("p50_ms", "p95_ms", "p99_ms", "max_ms", "mean_ms", "infer_p50_ms", "fps", "load_ms", "first_ms", "peak_mb")


def task(model: Path, **changes: object) -> Task:
    defaults = {"backend": "onnxruntime", "precision": None, "threads": 1, "warm_up": 1, "images": ()}
    return Task(model=str(model), **{**defaults, **changes})  # type: ignore[arg-type]


class TestRow:
    def test_figures_by_hand(self) -> None:
        latencies = (*(float(value) for value in range(1, 101)), 1000.0)  # one run far off, which stays
        row = Row(
            backend="torch",
            precision="fp32",
            threads=2,
            load_ms=5,
            first_ms=6,
            latencies_ms=latencies,
            inferences_ms=(0.5,) * 101,
            peak_mb=7,
        )
        fields = row.fields()
        # of 101 sorted values the p-th percentile is the one at place p
        assert (fields["p50_ms"], fields["p95_ms"], fields["p99_ms"]) == (51, 96, 100)
        assert fields["max_ms"] == 1000
        assert fields["mean_ms"] == pytest.approx((5050 + 1000) / 101)
        assert fields["fps"] == pytest.approx(101 / 6.05)
        assert (fields["infer_p50_ms"], fields["runs"], fields["batch"], fields["threads"]) == (0.5, 101, 1, 2)

    def test_a_failure_has_its_reason_and_no_figure(self) -> None:
        row = Row(backend="torch", precision="bf16", threads=None, error="no bf16 here")
        assert row.fields() == {
            "backend": "torch",
            "precision": "bf16",
            "sampling": None,
            "threads": None,
            "batch": 1,
            "error": "no bf16 here",
        }


class TestBench:
    def test_rows_and_json(self, colour_onnx: Path, need) -> None:
        need("openvino")
        options = BenchOptions(
            backends=("onnxruntime", "openvino"), precisions=("fp32",), threads=1, runs=12, warm_up=2
        )
        steps: list[tuple[str, int, int]] = []
        fields = json.loads(bench(colour_onnx, options, progress=lambda *step: steps.append(step)).to_json())
        assert [(row["backend"], row["precision"]) for row in fields["rows"]] == [
            ("onnxruntime", "fp32"),
            ("openvino", "fp32"),
        ]
        for row in fields["rows"]:
            assert all(row[name] > 0 and math.isfinite(row[name]) for name in FIGURES), row
            assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
            assert row["infer_p50_ms"] <= row["p50_ms"]
            assert (row["runs"], row["threads"], row["batch"]) == (12, 1, 1)
        assert (fields["model"], fields["height"], fields["width"]) == ("colours", 64, 96)
        assert fields["machine"]["versions"].keys() >= {"ddsm-deploy", "numpy", "onnxruntime", "openvino"}
        assert fields["method"]["images"] == "noise at the model's input size"
        # rounds alternate: ten runs of one, ten of the other, and the rest in the same order
        rounds = [(text, done) for text, done, planned in steps if planned == 24]
        assert rounds == [
            ("onnxruntime fp32", 0),
            ("openvino fp32", ROUND),
            ("onnxruntime fp32", 20),
            ("openvino fp32", 22),
        ]

    def test_both_ways_of_sampling(self, tiny_fused: Path, missing) -> None:
        if not kernels.status().available:
            missing("kernels", kernels.status().reason)
        options = BenchOptions(backends=("onnxruntime",), samplings=("fused", "portable"), runs=1, warm_up=0)
        fields = json.loads(bench(tiny_fused, options).to_json())
        assert [row["sampling"] for row in fields["rows"]] == ["fused", "portable"]
        assert all(row["p50_ms"] > 0 for row in fields["rows"])

    def test_every_form_of_a_bundle_is_a_row(self, tiny_bundle: Path) -> None:
        options = BenchOptions(backends=("onnxruntime", "openvino"), threads=1, runs=1, warm_up=0)
        rows = {(row.backend, row.precision): row.error for row in bench(tiny_bundle, options).rows}
        expected = {("onnxruntime", p) for p in ("fp32", "fp16", "int8")}
        expected |= {("openvino", p) for p in ("fp32", "fp16", "bf16", "int8", "int8+bf16")}
        assert rows.keys() == expected
        assert [rows["onnxruntime", "int8"], rows["openvino", "int8"], rows["openvino", "fp32"]] == ["", "", ""]

    def test_a_file_alone_runs_as_it_is_written(self, tiny_files: dict[str, Path]) -> None:
        options = BenchOptions(backends=("onnxruntime",), threads=1, runs=1, warm_up=0)
        (row,) = bench(tiny_files["onnxruntime"], options).rows
        assert (row.precision, row.error) == ("int8", "")

    def test_what_cannot_run_is_a_row_with_its_reason(self, colour_onnx: Path, need) -> None:
        need("openvino")
        options = BenchOptions(backends=("openvino", "onnxruntime"), precisions=("fp32", "int8"), runs=1, warm_up=0)
        rows = bench(colour_onnx, options).rows
        reasons = {(row.backend, row.precision): row.error for row in rows}
        assert reasons.keys() == {(b, p) for b in ("openvino", "onnxruntime") for p in ("fp32", "int8")}
        assert "not at int8" in reasons["openvino", "int8"]
        assert "not at int8" in reasons["onnxruntime", "int8"]
        assert reasons["onnxruntime", "fp32"] == reasons["openvino", "fp32"] == ""

    def test_a_provider_is_onnxruntimes_alone(self, colour_onnx: Path, need, missing) -> None:
        need("openvino")
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            missing("cpu-only", "this onnxruntime has CUDA")
        options = BenchOptions(backends=("onnxruntime", "openvino"), provider="cuda", runs=1, warm_up=0)
        rows = {row.backend: row for row in bench(colour_onnx, options).rows}
        assert "no CUDAExecutionProvider" in rows["onnxruntime"].error
        assert (rows["onnxruntime"].fields()["provider"], rows["openvino"].provider) == ("cuda", "cpu")
        assert rows["openvino"].error == ""

    def test_the_time_limit_ends_a_row_after_its_round(self, colour_onnx: Path) -> None:
        options = BenchOptions(backends=("onnxruntime",), runs=1000, seconds=1e-6, warm_up=0)
        (row,) = bench(colour_onnx, options).rows
        assert len(row.latencies_ms) == ROUND

    def test_given_images_are_what_runs(self, colour_onnx: Path, tmp_path: Path) -> None:
        for index in range(2):
            assert cv2.imwrite(str(tmp_path / f"{index}.png"), np.zeros((640, 960, 3), np.uint8))
        options = BenchOptions(backends=("onnxruntime",), runs=4, warm_up=1, images=tmp_path)
        result = bench(colour_onnx, options)
        assert result.images == f"2 of {tmp_path}"
        assert not result.rows[0].error

    def test_ctrl_c_leaves_the_rows_that_have_figures(self, colour_onnx: Path, need) -> None:
        need("openvino")

        def stop(_: str, done: int, planned: int) -> None:
            if planned == 200 and done == ROUND:  # the first row has had its round, the second not yet
                raise KeyboardInterrupt

        options = BenchOptions(backends=("onnxruntime", "openvino"), precisions=("fp32",), runs=100, warm_up=0)
        result = bench(colour_onnx, options, progress=stop)
        assert [(row.backend, len(row.latencies_ms)) for row in result.rows] == [("onnxruntime", ROUND)]
        assert json.loads(result.to_json())["interrupted"] is True

    def test_a_model_of_open_size_runs_at_each_images_own(self, tmp_path: Path) -> None:
        model = write_colour_model(tmp_path / "open.onnx", size=(64, 96), dynamic=True)
        cv2.imwrite(str(tmp_path / "image.png"), np.zeros((40, 50, 3), np.uint8))
        quick = {"backends": ("onnxruntime",), "runs": 1, "warm_up": 0}
        assert bench(model, BenchOptions(**quick)).size == (64, 96)  # type: ignore[arg-type] # the noise's
        result = bench(model, BenchOptions(**quick, images=tmp_path))  # type: ignore[arg-type]
        fields = json.loads(result.to_json())
        assert (result.size, fields["height"], fields["width"]) == (None, None, None)

    def test_an_unreadable_image_is_an_error_of_the_row(self, colour_onnx: Path, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"no image")
        (row,) = bench(colour_onnx, BenchOptions(backends=("onnxruntime",), images=tmp_path)).rows
        assert row.error.startswith(f"{tmp_path}/a.png: ")

    def test_no_such_model(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError):
            bench(tmp_path / "missing.onnx")


class TestWorker:
    def test_a_process_that_dies_is_an_error_with_its_signal(self, colour_onnx: Path) -> None:
        with Worker(task(colour_onnx)) as worker:
            worker.round(2)
            assert len(worker.times) == 2
            os.kill(worker.pid, signal.SIGKILL)
            worker.round(2)
            assert worker.row().error == "its process ended with signal 9"

    def test_a_process_that_fails_tells_its_last_words(self, colour_onnx: Path) -> None:
        with Worker(task(colour_onnx, warm_up="many")) as worker:  # a bug, as it would show there
            assert worker.row().error.startswith("its process ended with exit code 1: TypeError: ")

    def test_it_is_gone_at_the_end(self, colour_onnx: Path) -> None:
        with Worker(task(colour_onnx)) as worker:
            pid = worker.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_what_a_runtime_prints_does_not_reach_the_replies(self, colour_onnx: Path, tmp_path: Path) -> None:
        # sitecustomize runs before anything else, and prints at the end too, as a talkative native library does
        (tmp_path / "sitecustomize.py").write_text("import atexit, os; atexit.register(os.write, 1, b'noise\\n')")
        done = subprocess.run(
            [sys.executable, "-m", "ddsm_deploy.evaluate.worker"],
            input=f'{json.dumps(vars(task(colour_onnx)))}\n{{"runs": 3}}\n',
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        ready, times = map(json.loads, done.stdout.splitlines())
        assert ready.keys() == {"precision", "sampling", "open_size", "load_ms", "first_ms"}
        assert len(times["times_ms"]) == 3
        assert "noise" in done.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backends": ("tflite",)}, "backend is 'tflite'; expected one of torch, onnxruntime, openvino"),
        ({"precisions": ("fp8",)}, "precision is 'fp8'; expected one of"),
        ({"threads": 0}, "threads is 0; expected an integer of at least 1"),
        ({"runs": 0}, "runs is 0; expected at least 1"),
        ({"warm_up": -1}, "warm-up is -1 runs; expected at least 0"),
        ({"seconds": 0}, "time limit is 0 seconds; expected more than 0"),
        ({"seconds": math.nan}, "time limit is nan seconds"),
    ],
)
def test_wrong_options(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchOptions(**changes)  # type: ignore[arg-type]


def test_a_sample_of_many_images(tmp_path: Path) -> None:
    for index in range(100):
        (tmp_path / f"{index:03}.png").touch()
    found = list_images(tmp_path)
    assert len(found) <= MAX_IMAGES
    assert found[:2] == (str(tmp_path / "000.png"), str(tmp_path / "004.png"))


def test_a_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for folder, words in ((tmp_path, "no image there"), (tmp_path / "missing", "no such folder")):
        with pytest.raises(InputError, match=words):
            list_images(folder)


def test_machine_facts_are_json_and_name_the_processor() -> None:
    facts = json.loads(json.dumps(machine_facts()))
    assert facts["cores_usable"] >= 1
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    if sys.platform == "linux":
        assert facts["memory_mb"] > 100
        assert len(facts["load_average"]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only ru_maxrss tells, which holds the parent's peak")
def test_peak_memory_is_the_process_own() -> None:
    ballast = np.ones(400_000_000 // 8)  # a parent far larger than the child
    code = (
        "from ddsm_deploy.evaluate.machine import peak_memory_mb as peak\n"
        "print(peak()); data = b'x' * 50_000_000; print(peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, after = map(float, done.stdout.split())
    assert 5 < before < 150
    assert 45 < after - before < 60
    assert ballast[0] == 1
