"""How close `ddsm segment` comes to what this machine allows, on a folder of frames.

    python benchmarks/segment_throughput.py --json throughput.json

What the machine allows is measured in the same run, in rounds that alternate with it: each stage (decode, infer,
encode) alone, on all cores, over the same frames. No pipeline can be quicker than its slowest stage alone, nor than the
CPU time of all stages spread evenly over the cores; the larger of the two is the least time a frame, and

    efficiency = least time a frame / time a frame of `segment_files` from its call to its return

Inference alone is measured twice, as frames side by side with one thread each and as one frame at a time on all cores;
the quicker one counts. All figures are medians over the rounds. Loading the model is in none of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2

from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.outputs import Products, write_files
from ddsm_deploy.runtime.pipeline import open_for_batch, segment_files, usable_cores
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.sources import find_sources
from ddsm_deploy.runtime.worker import SegmentOptions

REPO = Path(__file__).parent.parent
CAMVID = Path(os.environ.get("DDSM_CAMVID", REPO.parent / "shared" / "data" / "camvid"))

Times = dict[str, list[float]]


def main() -> None:
    options = _arguments()
    cores = usable_cores()
    workers = options.workers or cores
    load = os.getloadavg()[0]
    if load > 0.3 * cores:
        print(f"warning: the load average is {load:.1f}, so other work shares these figures", file=sys.stderr)

    wall: Times = {}
    cpu: Times = {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_for_batch(options.model, backend=options.backend, workers=workers) as segmenter,
        Segmenter.open(options.model, backend=segmenter.backend) as single,
    ):
        frames = Frames(options.data, Path(scratch), segmenter)
        for round_number in range(options.rounds + 1):
            settings = SegmentOptions(output=Path(scratch, f"run{round_number}"), workers=workers)
            measured = _round(frames, segmenter, single, settings)
            if round_number:  # the first one warms up
                for stage, (wall_ms, cpu_ms) in measured.items():
                    wall.setdefault(stage, []).append(wall_ms)
                    cpu.setdefault(stage, []).append(cpu_ms)
        result = {
            **_result(wall, cpu, cores),
            "backend": segmenter.backend,
            "precision": segmenter.precision,
            "model": segmenter.spec.name,
            "frames": frames.count,
            "rounds": options.rounds,
            "workers": workers,
            "cores": cores,
            "load_average_at_start": load,
            "machine": _machine(),
        }
    _print(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Frames:
    """The frames of a folder, decoded once, with their segmentations."""

    def __init__(self, folder: Path, scratch: Path, segmenter: Segmenter) -> None:
        self.folder = folder
        self.paths = [source.path for source in find_sources([folder], scratch / "none")]
        self.count = len(self.paths)
        self.scratch = scratch / "encode"
        self.images: list[Image] = [read_image(path) for path in self.paths]
        self.results = [segmenter.predict(image) for image in self.images]

    def decode(self, index: int) -> None:
        read_image(self.paths[index])

    def encode(self, index: int) -> None:
        encoded = Products().encode(self.results[index], self.images[index], file_name="")
        write_files(self.scratch, {f"masks/{index}.png": encoded["masks"]})


def _round(
    frames: Frames, segmenter: Segmenter, single: Segmenter, settings: SegmentOptions
) -> dict[str, tuple[float, float]]:
    """Stage -> wall and CPU milliseconds a frame."""
    count, workers = frames.count, settings.workers or 1
    return {
        "decode": _timed(frames.decode, count, workers),
        "infer": _timed(lambda i: segmenter.predict(frames.images[i]), count, workers),
        "infer_one_by_one": _timed(lambda i: single.predict(frames.images[i]), count, 1),
        "encode": _timed(frames.encode, count, workers),
        "end_to_end": _timed_run(lambda: segment_files([frames.folder], segmenter, settings), count),
    }


def _timed(stage: Callable[[int], object], count: int, workers: int) -> tuple[float, float]:
    """Wall and CPU milliseconds a frame of one stage alone on `workers` threads."""

    def run() -> None:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(stage, range(count)):
                pass

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # as in the pipeline
    try:
        return _timed_run(run, count)
    finally:
        cv2.setNumThreads(threads)


def _timed_run(run: Callable[[], object], count: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3 / count, (time.process_time() - cpu) * 1e3 / count


def _result(wall: Times, cpu: Times, cores: int) -> dict[str, Any]:
    wall_ms = {stage: statistics.median(times) for stage, times in wall.items()}
    cpu_ms = {stage: statistics.median(times) for stage, times in cpu.items()}
    infer_wall = min(wall_ms["infer"], wall_ms["infer_one_by_one"])
    infer_cpu = min(cpu_ms["infer"], cpu_ms["infer_one_by_one"])
    slowest_stage = max(wall_ms["decode"], infer_wall, wall_ms["encode"])
    shared_cpu = (cpu_ms["decode"] + infer_cpu + cpu_ms["encode"]) / cores
    least = max(slowest_stage, shared_cpu)
    return {
        "efficiency": least / wall_ms["end_to_end"],
        "fps": 1e3 / wall_ms["end_to_end"],
        "limit_fps": 1e3 / least,
        "slowest_stage_ms": slowest_stage,
        "cpu_over_cores_ms": shared_cpu,
        "wall_ms": wall_ms,
        "cpu_ms": cpu_ms,
        "efficiency_spread": _spread(wall["end_to_end"], least),
    }


def _spread(times: Sequence[float], least: float) -> list[float]:
    """Efficiency of the slowest and of the quickest round, against the same limit."""
    return [least / max(times), least / min(times)]


def _machine() -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    return {"cpu": cpu, "system": platform.platform(), "python": platform.python_version(), "opencv": cv2.__version__}


def _print(result: dict[str, Any]) -> None:
    print(f"{result['frames']} frames, {result['backend']} {result['precision']}, {result['workers']} workers")
    for stage, milliseconds in result["wall_ms"].items():
        print(f"  {stage:17} {milliseconds:7.2f} ms wall  {result['cpu_ms'][stage]:7.2f} ms CPU")
    print(f"{result['fps']:.1f} FPS of {result['limit_fps']:.1f} possible: efficiency {result['efficiency']:.3f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--data", type=Path, default=CAMVID / "val", help="folder of frames (default: CamVid's val)")
    parser.add_argument("--model", help="file, bundle or shipped name (default: ddsm-lite0)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, help="frames side by side (default: one a core)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
