"""Frames at a camera's pace: the schedule, what waits and what is dropped, the figures, the load, and the plot.

No test here asks how quick anything is. Where a test needs the segmenter to be slow, it holds it until it is let go.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ddsm_deploy.errors import BackendError, ConfigError, DdsmError
from ddsm_deploy.evaluate.baseline import Gate
from ddsm_deploy.evaluate.busy import busy_processes
from ddsm_deploy.evaluate.paced import PacedOptions, PacedResult, bench_paced
from ddsm_deploy.evaluate.pacing import Record, Schedule, pace, run_paced
from ddsm_deploy.images import Image, Labels
from ddsm_deploy.runtime.segmentation import Segmentation

REPO = Path(__file__).parents[2]
IMAGES = [np.full((4, 6, 3), shade, np.uint8) for shade in range(3)]
MASKS = [image[..., 0] for image in IMAGES]
"""Each image's mask holds its shade, so that each is told from the others."""


def segmentation(mask: Labels) -> Segmentation:
    return Segmentation(mask=mask, classes=("a", "b", "c"), palette=((0, 0, 0),) * 3)


def own_mask(image: Image) -> Segmentation:
    return segmentation(image[..., 0].copy())


def new_record(*, frames: int, rate: float = 200.0, policy: str = "latest", patience: float = 60.0) -> Record:
    return Record(Schedule(rate=rate, frames=frames, policy=policy, patience=patience), MASKS)


def held_until_all_came(record: Record) -> Callable[[Image], Segmentation]:
    """A segmenter that gives no mask before the camera has handed over its last frame."""

    def segment(image: Image) -> Segmentation:
        while np.isnan(record.arrived[-1]):
            time.sleep(0.001)
        return own_mask(image)

    return segment


class Clock:
    """A clock of the test's own, that moves only by what is done."""

    def __init__(self, *, oversleep: float = 0.0) -> None:
        self.now = 10.0
        self.oversleep = oversleep
        self.naps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds + self.oversleep


class TestPace:
    def test_no_drift(self) -> None:
        """Each sleep is 4 ms too long and each hand-over takes 3 ms; neither adds up over 300 frames."""
        clock, due, arrived = Clock(oversleep=0.004), 10.5 + np.arange(300) / 30, []

        def arrive(index: int) -> None:
            arrived.append((index, clock.now))
            clock.now += 0.003

        pace(due, arrive, threading.Event(), clock=clock, sleep=clock.sleep)
        assert [index for index, _ in arrived] == list(range(300))
        late = np.array([moment for _, moment in arrived]) - due
        assert late.min() >= 0
        assert late.max() <= 0.004 + 1e-9

    def test_after_a_pause_it_is_back_on_schedule(self) -> None:
        clock, arrived = Clock(), []

        def arrive(index: int) -> None:
            arrived.append(clock.now)
            clock.now += 0.35 if index == 2 else 0.0  # as if the machine had stood still

        pace(10 + np.arange(8) / 10, arrive, threading.Event(), clock=clock, sleep=clock.sleep)
        # frames 3 to 5 were due meanwhile and come at once; frame 6 is on time again
        assert arrived == pytest.approx([10.0, 10.1, 10.2, 10.55, 10.55, 10.55, 10.6, 10.7])

    def test_stop_ends_it(self) -> None:
        clock, stop, arrived = Clock(), threading.Event(), []

        def arrive(index: int) -> None:
            arrived.append(index)
            if index == 3:
                stop.set()

        pace(10 + np.arange(100.0), arrive, stop, clock=clock, sleep=clock.sleep)
        assert arrived == [0, 1, 2, 3]
        assert max(clock.naps) <= 0.1  # so a camera of one frame a minute ends as quickly


class TestRun:
    def test_latest_drops_what_came_while_it_was_busy(self) -> None:
        record = new_record(frames=20)
        run_paced(held_until_all_came(record), IMAGES, record)
        first = int(np.nanargmin(record.taken))  # 0, unless this machine kept the worker from waking for long
        assert set(np.flatnonzero(record.delivered)) == {first, 19}
        assert not np.isnan(record.arrived).any()  # the camera waited for nobody
        assert (record.reordered, record.mixed_up) == (0, 0)

    def test_every_keeps_all_and_lateness_adds_up(self) -> None:
        record = new_record(frames=20, policy="every")
        run_paced(held_until_all_came(record), IMAGES, record)
        assert record.delivered.all()
        assert np.all(np.diff(record.done) > 0)
        assert record.latencies_ms[0] >= 1e3 * 19 / 200  # the first one was held until the last one had come
        assert (record.reordered, record.mixed_up) == (0, 0)

    def test_latency_counts_from_the_moment_a_frame_is_due(self) -> None:
        record = new_record(frames=5, policy="every")
        run_paced(own_mask, IMAGES, record)
        assert np.allclose(np.diff(record.due), 1 / 200)
        assert np.all(record.due <= record.arrived)
        assert np.all(record.arrived <= record.done)
        assert record.latencies_ms == pytest.approx((record.done - record.due) * 1e3)

    def test_what_still_waits_when_patience_ends_is_dropped(self) -> None:
        record = new_record(frames=5, policy="every", patience=0.1)

        def segment(image: Image) -> Segmentation:
            while np.count_nonzero(record.memory[:, 0] > 5 / 200 + 0.1) < 2:  # after one of them the others went
                time.sleep(0.001)
            return own_mask(image)

        run_paced(segment, IMAGES, record)
        # the first one was in hand, unless this machine kept the worker from waking for as long
        assert not record.delivered[1:].any()

    def test_a_mask_of_another_frame_is_noticed(self) -> None:
        calls = []

        def segment(image: Image) -> Segmentation:
            calls.append(image)
            return own_mask(calls[-2] if len(calls) == 4 else image)

        record = new_record(frames=9, policy="every")
        run_paced(segment, IMAGES, record)
        assert (record.mixed_up, record.reordered) == (1, 0)

    def test_warm_up_is_in_the_thread_that_works_and_does_not_count(self) -> None:
        threads = []

        def segment(image: Image) -> Segmentation:
            threads.append(threading.get_ident())
            return own_mask(image)

        record = new_record(frames=3, policy="every")
        run_paced(segment, IMAGES, record, warm_up=4)
        assert len(threads) == 7
        assert set(threads) == {threads[0]} != {threading.get_ident()}
        assert record.delivered.all()

    def test_a_failure_ends_it_and_comes_out(self) -> None:
        def segment(image: Image) -> Segmentation:
            raise BackendError("out of breath")

        with pytest.raises(BackendError, match="out of breath"):
            run_paced(segment, IMAGES, new_record(frames=1000, rate=1.0))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ddsm-")]

    @pytest.mark.parametrize("policy", ["latest", "every"])
    def test_ctrl_c_keeps_what_came_before(self, policy: str) -> None:
        calls = []

        def segment(image: Image) -> Segmentation:
            calls.append(image)
            if len(calls) == 8:
                signal.raise_signal(signal.SIGINT)  # Python raises in the main thread, whichever gets it
            return own_mask(image)

        record = new_record(frames=100_000, policy=policy)
        run_paced(segment, IMAGES, record)
        assert record.interrupted
        assert 8 <= len(calls) == np.count_nonzero(record.delivered)
        assert record.delivered[-1]  # those that came to no turn are no dropped ones
        assert len(record.latencies_ms) == len(record.arrived) == len(record.taken) < 1000
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("ddsm-")]

    def test_a_failure_after_ctrl_c_comes_out_all_the_same(self) -> None:
        calls = []

        def segment(image: Image) -> Segmentation:
            calls.append(image)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.5)
                raise BackendError("out of breath")
            return own_mask(image)

        with pytest.raises(BackendError, match="out of breath"):
            run_paced(segment, IMAGES, new_record(frames=1000))

    def test_ctrl_c_before_the_first_frame_leaves_nothing(self) -> None:
        record = new_record(frames=3, rate=0.001)
        record.due += 5  # seconds until the first one
        timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run_paced(own_mask, IMAGES, record)
        timer.join()

    @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells the memory held now")
    def test_memory_that_grows_is_seen(self) -> None:
        kept = []

        def segment(image: Image) -> Segmentation:
            # of the system, not of the heap, which may have held it already
            kept.append(mmap.mmap(-1, 20_000_000))
            np.frombuffer(kept[-1], np.uint8)[:] = 1
            return own_mask(image)

        record = new_record(frames=4, policy="every")
        run_paced(segment, IMAGES, record)
        assert record.memory[-1, 1] - record.memory[0, 1] == pytest.approx(80, abs=20)


class TestRecord:
    def test_masks_in_any_order(self) -> None:
        record = new_record(frames=6)
        for index in (0, 2, 1, 5, 3):
            record.finish(index, MASKS[index % 3])
        assert (record.reordered, record.mixed_up) == (2, 0)  # 1 after 2, 3 after 5
        assert record.delivered.tolist() == [True, True, True, True, False, True]

    @pytest.mark.parametrize("mask", [MASKS[1], MASKS[0][:2], np.where(np.eye(4, 6), 1, MASKS[0]).astype(np.uint8)])
    def test_any_other_mask_is_wrong(self, mask: Labels) -> None:
        record = new_record(frames=1)
        record.finish(0, mask)
        assert record.mixed_up == 1


def made_result(latencies_ms: list[float], **options: object) -> PacedResult:
    """A result at 10 frames a second with these latencies; NaN for dropped frames."""
    chosen = PacedOptions(rate=10, duration=len(latencies_ms) / 10, **options)  # type: ignore[arg-type]
    record = Record(Schedule(rate=10, frames=len(latencies_ms)), MASKS)
    record.due += 100
    record.arrived[:] = record.due + 0.001
    record.taken[:] = record.due + 0.002
    record.done[:] = record.due + np.array(latencies_ms) / 1e3
    settings = {"model": "colours", "height": 64, "width": 96, "backend": "onnxruntime", "precision": "fp32"}
    settings |= {"rate": 10, "policy": chosen.policy, "load": chosen.load}
    return PacedResult(settings=settings, choice="", distinct_masks=3, options=chosen, machine={}, record=record)


class TestResult:
    def test_figures_by_hand(self) -> None:
        result = made_result([*map(float, range(101)), math.nan, math.nan], deadline_ms=95.5)
        fields = result.fields()
        # of 101 sorted values the p-th percentile is the one at place p
        figures = [fields[key] for key in ("p50_ms", "p95_ms", "p99_ms", "max_ms", "mean_ms")]
        assert figures == pytest.approx([50, 95, 99, 100, 50])
        assert fields["jitter_ms"] == pytest.approx(math.sqrt((101**2 - 1) / 12))  # of 101 neighbouring integers
        assert fields["jitter_p99_p50_ms"] == pytest.approx(49)
        assert (fields["frames"], fields["delivered"], fields["dropped"]) == (103, 101, 2)
        assert fields["deadline_misses"] == 5  # 96 to 100
        shares = [fields[key] for key in ("deadline_miss_share", "drop_share", "in_time_share")]
        assert shares == pytest.approx([5 / 103, 2 / 103, 96 / 103])
        assert fields["work_p50_ms"] == pytest.approx(48)
        assert fields["camera_late_max_ms"] == pytest.approx(1)

    def test_the_deadline_is_a_frames_period_unless_given(self) -> None:
        assert PacedOptions(rate=25).deadline == 40
        assert PacedOptions(rate=25, deadline_ms=33).deadline == 33

    def test_json_when_nothing_was_delivered(self) -> None:
        fields = json.loads(made_result([math.nan] * 3).to_json(per_frame=True), parse_constant=pytest.fail)
        assert (fields["p50_ms"], fields["p99_ms"], fields["jitter_ms"]) == (None, None, None)
        assert (fields["dropped"], fields["deadline_misses"]) == (3, 0)
        assert fields["latencies_ms"] == [None, None, None]


class TestBench:
    def test_a_model_at_a_cameras_pace(self, colour_onnx: Path) -> None:
        options = PacedOptions(
            rate=20, duration=1, backend="onnxruntime", threads=1, warm_up=1, images=REPO / "examples" / "frames"
        )
        steps: list[str] = []
        fields = json.loads(bench_paced(colour_onnx, options, progress=steps.append).to_json(per_frame=True))
        assert fields["delivered"] + fields["dropped"] == fields["frames"] == len(fields["latencies_ms"]) == 20
        assert (fields["reordered"], fields["mixed_up"], fields["distinct_masks"]) == (0, 0, 6)
        assert 0 < fields["p50_ms"] <= fields["p95_ms"] <= fields["p99_ms"] <= fields["max_ms"]
        assert fields["settings"]["deadline_ms"] == 50
        assert fields["settings"]["images"].startswith("6 of ")
        assert fields["machine"]["cores_usable"] >= 1
        assert fields["choice"] == "onnxruntime, as asked for"
        assert fields["verdict"] is None
        assert steps == ["opening", "onnxruntime fp32: 20 frames in 1 s"]

    def test_auto_says_what_it_chose(self, colour_onnx: Path) -> None:
        result = bench_paced(colour_onnx, PacedOptions(rate=50, duration=0.1, warm_up=0))
        assert result.settings["backend"] in result.choice

    def test_a_missing_precision_is_no_other(self, colour_onnx: Path) -> None:
        with pytest.raises(BackendError, match="int8"):
            bench_paced(colour_onnx, PacedOptions(rate=50, duration=0.1, backend="onnxruntime", precision="int8"))

    def test_a_baseline_of_something_else_is_refused_before_the_run(self, colour_onnx: Path, tmp_path: Path) -> None:
        quick = PacedOptions(rate=50, duration=0.1, backend="onnxruntime", threads=1, warm_up=0)
        earlier = tmp_path / "earlier.json"
        earlier.write_text(bench_paced(colour_onnx, quick).to_json(), encoding="utf-8")
        hour_long = dataclasses.replace(quick, rate=40, duration=3600, gate=Gate(baseline=earlier))
        with pytest.raises(ConfigError, match=r"earlier.json is of another run: rate 50, here 40"):
            bench_paced(colour_onnx, hour_long)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rate": 0}, "the rate is 0 frames a second"),
        ({"rate": math.nan}, "the rate is nan"),
        ({"deadline_ms": 0}, "the deadline is 0 ms"),
        ({"duration": math.inf}, "the duration is inf seconds"),
        ({"rate": 1e6, "duration": 1e6}, "are more than 10000000"),
        ({"policy": "newest"}, "policy is 'newest'; expected every or latest"),
        ({"load": -1}, "the load is -1 processes"),
        ({"warm_up": -1}, "warm-up is -1 runs"),
        ({"backend": "tflite"}, "backend is 'tflite'; expected one of auto, torch"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_wrong_options(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PacedOptions(**{"rate": 30, **changes})  # type: ignore[arg-type]


class TestBusyProcesses:
    def test_they_work_and_are_gone_at_the_end(self) -> None:
        with busy_processes(2) as pids:
            assert len(set(pids)) == 2
            before = [_processor_ticks(pid) for pid in pids]
            while any(_processor_ticks(pid) <= ticks for pid, ticks in zip(pids, before, strict=True)):
                time.sleep(0.01)  # to the test's time limit, should they idle
        assert not any(map(_runs, pids))

    def test_they_are_gone_after_a_failure(self) -> None:
        with pytest.raises(BackendError), busy_processes(1) as pids:
            raise BackendError("the measurement failed")
        assert not _runs(pids[0])

    def test_one_that_ends_early_spoils_the_measurement(self) -> None:
        with (
            pytest.raises(DdsmError, match=r"1 of 2 processes .* ended early \(exit code -9\)"),
            busy_processes(2) as p,
        ):
            os.kill(p[0], signal.SIGKILL)
            # not `_runs`: its first thread is a zombie before its last one has ended
            os.waitid(os.P_PID, p[0], os.WEXITED | os.WNOWAIT)

    def test_they_do_not_outlive_a_parent_that_is_killed(self) -> None:
        code = (
            "from ddsm_deploy.evaluate.busy import busy_processes\n"
            "import os, signal\n"
            "with busy_processes(1) as pids:\n"
            "    print(*pids, flush=True)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == -signal.SIGKILL
        while _runs(int(done.stdout)):
            time.sleep(0.01)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on, see proc_pid_stat(5); those of an ended process if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["X"]


def _runs(pid: int) -> bool:
    return _stat(pid)[0] not in "ZX"  # a zombie has ended, and waits for its parent to see it


def _processor_ticks(pid: int) -> int:
    return int(_stat(pid)[11])  # utime


class TestPlot:
    @pytest.mark.parametrize(
        "latencies",
        [[20.0, 130.0, math.nan, 30.0] * 20, [25.0], [math.nan] * 5],
        ids=["late and dropped", "one frame", "all dropped"],
    )
    def test_it_opens_and_shows_the_deadline(self, latencies: list[float], tmp_path: Path, need) -> None:
        need("matplotlib")
        from ddsm_deploy.evaluate.pacedplot import plot_paced

        plot_paced(made_result(latencies, load=2), tmp_path / "plot.png")
        with PIL.Image.open(tmp_path / "plot.png") as image:
            image.load()
            assert (image.format, image.size) == ("PNG", (1320, 495))  # 12×4.5 inches at 110 dots
            rgb = np.asarray(image.convert("RGB")).astype(int)
        red = rgb[..., 0] - rgb[..., 1:].max(axis=2) > 30
        assert red.sum(axis=1).max() > 500  # the deadline: across the left part
        assert red.sum(axis=0).max() > 250  # and up the right one


def test_the_long_benchmark(colour_onnx: Path, tmp_path: Path) -> None:
    report = tmp_path / "paced.json"
    script = [sys.executable, str(REPO / "benchmarks" / "paced_stream.py"), "--model", str(colour_onnx)]
    asked = ["--rate", "20", "--seconds", "0.5", "--backend", "onnxruntime", "--precision", "fp32", "--threads", "1"]
    done = subprocess.run([*script, *asked, "--json", str(report)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fields = json.loads(report.read_text(encoding="utf-8"))
    assert fields.keys() >= {"deadline_misses", "dropped", "reordered", "p50_ms", "p99_ms", "rss_growth_mb"}
    assert (fields["frames"], fields["mixed_up"], fields["settings"]["deadline_ms"]) == (10, 0, 50)
