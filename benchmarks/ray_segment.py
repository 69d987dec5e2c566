"""`ddsm segment --engine ray` against the local engine on the same frames, and what is left when a worker is killed.

    python benchmarks/ray_segment.py --frames 2000 --workers 2 --json ray.json

CamVid's validation frames are repeated under new names (links in a temporary folder) to make up the number. The engines
take turns, `--rounds` times each; then one run on Ray has a worker killed by SIGKILL after a third of the frames. Every
run must leave one output for each frame, byte for byte the first local run's. Both engines run the same backend at the
same precision with as many frames side by side: `workers` x `threads`.

Times are from the call to the return of each engine, with the model loaded (local) or Ray running (ray): those of Ray
hold the start of its workers, which load the model. `steady` leaves that out: frames a second from the first finished
batch to the last one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).parent.parent
CAMVID = Path(os.environ.get("DDSM_CAMVID", REPO.parent / "shared" / "data" / "camvid"))
sys.path.insert(0, str(REPO / "tests"))

from ray_processes import worker_processes  # noqa: E402

from ddsm_deploy.listing import MANIFEST_NAME  # noqa: E402
from ddsm_deploy.ray.cluster import ray_cluster  # noqa: E402
from ddsm_deploy.ray.options import RayOptions  # noqa: E402
from ddsm_deploy.ray.run import segment_on_ray  # noqa: E402
from ddsm_deploy.runtime.decisions import usable_cores  # noqa: E402
from ddsm_deploy.runtime.pipeline import SegmentSummary, open_for_batch, segment_files  # noqa: E402
from ddsm_deploy.runtime.segmenter import Segmenter  # noqa: E402
from ddsm_deploy.runtime.sources import find_sources  # noqa: E402
from ddsm_deploy.runtime.worker import SegmentOptions  # noqa: E402


def main() -> None:
    options = _arguments()
    threads = options.threads or max(1, usable_cores() // options.workers)
    if (load := os.getloadavg()[0]) > 0.3 * usable_cores():
        print(f"warning: the load average is {load:.1f}, so other work shares these figures", file=sys.stderr)
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_for_batch(
            options.model, backend=options.backend, precision=options.precision, workers=options.workers * threads
        ) as segmenter,
    ):
        bench = Bench(Path(scratch), segmenter, options, threads)
        begin = time.perf_counter()
        with ray_cluster(bench.ray_options("none")):
            started = time.perf_counter() - begin
            runs = []
            for number in range(options.rounds):
                runs += [bench.local(f"local{number}"), bench.on_ray(f"ray{number}")]
            if options.kill:
                runs.append(bench.on_ray("killed", kill_at=options.frames // 3))
    result = {
        "runs": runs,
        "local_fps": _median(runs, "local", "fps"),
        "ray_fps": _median(runs, "ray", "fps"),
        "ray_steady_fps": _median(runs, "ray", "steady_fps"),
        "ray_start_s": started,
        "frames": options.frames,
        "workers": options.workers,
        "threads": threads,
        "batch": options.batch,
        "backend": segmenter.backend,
        "precision": segmenter.precision,
        "cores": usable_cores(),
        "load_average_at_start": load,
        "machine": platform.platform(),
    }
    result["ratio"] = result["ray_fps"] / result["local_fps"]
    result["steady_ratio"] = result["ray_steady_fps"] / result["local_fps"]
    _print(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not all(run["whole"] for run in runs):
        sys.exit("an output is missing, there twice, or not the local engine's")


class Bench:
    """Frames, and runs over them, each checked against the first one's outputs."""

    def __init__(self, scratch: Path, segmenter: Segmenter, options: argparse.Namespace, threads: int) -> None:
        self.scratch = scratch
        self.segmenter = segmenter
        self.options = options
        self.threads = threads
        self.frames = scratch / "frames"
        self.frames.mkdir()
        self.wanted: dict[str, str] = {}
        paths = [source.path for source in find_sources([options.data], scratch / "none")]
        for index in range(options.frames):
            path = Path(paths[index % len(paths)])
            (self.frames / f"{index:06}{path.suffix}").symlink_to(path)

    def ray_options(self, name: str) -> RayOptions:
        output = str(self.scratch / name)
        return RayOptions(output=output, workers=self.options.workers, threads=self.threads, batch=self.options.batch)

    def local(self, name: str) -> dict[str, Any]:
        settings = SegmentOptions(output=self.scratch / name, workers=self.options.workers * self.threads)
        begin = time.perf_counter()
        summary = segment_files([self.frames], self.segmenter, settings)
        return self._checked("local", name, summary, time.perf_counter() - begin)

    def on_ray(self, name: str, *, kill_at: int | None = None) -> dict[str, Any]:
        times: list[tuple[float, int]] = []
        killed: list[int] = []

        def progress(summary: SegmentSummary) -> None:
            if summary.done:
                times.append((time.perf_counter(), summary.done))
            if kill_at is not None and summary.done >= kill_at and not killed:
                killed.append(worker_processes()[0])
                os.kill(killed[0], signal.SIGKILL)

        begin = time.perf_counter()
        summary = segment_on_ray([str(self.frames)], self.segmenter, self.ray_options(name), progress=progress)
        run = self._checked("ray" if kill_at is None else "killed", name, summary, time.perf_counter() - begin)
        (first, some), (last, all_of_them) = times[0], times[-1]
        run["steady_fps"] = (all_of_them - some) / max(last - first, 1e-9)
        return run | {"killed": len(killed), "processes": summary.processes}

    def _checked(self, kind: str, name: str, summary: SegmentSummary, seconds: float) -> dict[str, Any]:
        found = {
            path.relative_to(self.scratch / name).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (self.scratch / name).rglob("*")
            if path.is_file() and path.name != MANIFEST_NAME
        }
        self.wanted = self.wanted or found
        lines = (self.scratch / name / MANIFEST_NAME).read_text(encoding="utf-8").splitlines()[1:]
        records = [json.loads(line)["source"] for line in lines]
        count = self.options.frames
        whole = len(found) == count and found == self.wanted and summary.done == count
        whole = whole and len(records) == len(set(records)) == count
        return {
            "kind": kind,
            "seconds": seconds,
            "fps": count / seconds,
            "outputs": len(found),
            "records": len(records),
            "differ": sum(self.wanted.get(file) != digest for file, digest in found.items()),
            "whole": whole,
        }


def _median(runs: list[dict[str, Any]], kind: str, figure: str) -> float:
    return statistics.median(run[figure] for run in runs if run["kind"] == kind)


def _print(result: dict[str, Any]) -> None:
    print(
        f"{result['frames']} frames, {result['backend']} {result['precision']}, {result['workers']} workers of "
        f"{result['threads']} threads, batches of {result['batch']}; Ray started in {result['ray_start_s']:.1f} s"
    )
    for run in result["runs"]:
        steady = f", {run['steady_fps']:.1f} steady" if "steady_fps" in run else ""
        dead = f"; {run['killed']} worker killed, {run['processes']} processes worked" if run.get("killed") else ""
        print(
            f"  {run['kind']:6} {run['seconds']:7.1f} s {run['fps']:6.1f} FPS{steady}; {run['outputs']} outputs, "
            f"{run['records']} records, {run['differ']} differ from the first run's{dead}"
        )
    print(
        f"ray / local: {result['ratio']:.3f} with the start of the workers, {result['steady_ratio']:.3f} steady "
        f"(medians of {result['ray_fps']:.1f}, {result['ray_steady_fps']:.1f} and {result['local_fps']:.1f} FPS)"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--data", type=Path, default=CAMVID / "val", help="folder of frames (default: CamVid's val)")
    parser.add_argument("--model", help="file, bundle or shipped name (default: ddsm-lite0)")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, help="frames side by side in a worker (default: cores / workers)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each engine")
    parser.add_argument("--kill", action=argparse.BooleanOptionalAction, default=True, help="end with a killed worker")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
