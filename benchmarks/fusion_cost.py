"""What the sampling branches cost: the whole DDSM network against the same network with ``fusion="add"``.

    python benchmarks/fusion_cost.py [--size 360x480 1024x2048] [--sampling fused] [--training] [--memory] [--json FILE]

``add`` is the model with its branches taken out: the same weights, and masks that mean little but take as long. Each
side runs in a process of its own on one and the same frame, and rounds of ten runs alternate between the two (as in
`ddsm bench`): in one process the threads of the side that has just run still spin, and take the cores from the other.
Times are of the inference alone, uint8 image to mask; ratios are of medians. Let nothing else run meanwhile.

``--training`` adds training steps in torch (see `fusion_training`), ``--memory`` peak memory (see `fusion_memory`).
The JSON is a list of rows: ``backend``, ``precision``, ``size``, ``threads``, ``sampling`` (what really ran),
``ms_fused``, ``ms_add``, ``ratio`` and more; rows of memory have ``kind`` ``memory`` and megabytes instead.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusion_memory
import fusion_training
from fusion_support import (
    CONFIGURATIONS,
    FRAME,
    SIDES,
    Pair,
    announce_machine,
    checkpoints,
    compare,
    export_pair,
    parse_size,
)

from ddsm_deploy.engines import EngineOptions, available_precisions, open_engine
from ddsm_deploy.evaluate.benchmark import ROUND, Worker
from ddsm_deploy.evaluate.worker import Task

BARS = {
    ("inference", "openvino", "fp32"): (1.4, 1.2),
    ("inference", "openvino", "bf16"): (1.7, 1.3),
    ("inference", "onnxruntime", "fp32"): (1.5, 1.3),
    ("training", "torch", "bf16"): (1.6, 1.3),
}
"""Kind, backend and precision -> the highest ratio that passes, and the one aimed for."""

MEMORY_BAR = (1.2, 1.1)

LARGE = 1_000_000
"""Pixels of an image from which `FEW` runs do instead of `MANY`: each takes a good part of a second."""

MANY, FEW = 50, 10


def main() -> None:
    args = _arguments()
    machine = announce_machine()
    print(f"ratio of medians, DDSM ({args.sampling}) to add; threads {', '.join(map(str, args.threads))}")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in measure(Path(scratch), args):
            row |= {"cpu": machine["cpu"], "load_average": machine["load_average"]}
            rows.append(row)
            print(line(row), flush=True)
            if row.get("sampling_note"):
                print(f"  {row['sampling_note']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(scratch: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows asked for, one after the other."""
    sides = checkpoints(scratch, args.model)
    wanted = [c for c in CONFIGURATIONS if args.only is None or "-".join(c) in args.only]
    for size in args.size if wanted else ():
        pair = export_pair(scratch, sides, size, args.sampling)
        for backend, precision in wanted:
            if precision not in available_precisions(backend):
                print(f"{backend} {precision}: this processor has none")
                continue
            for threads in args.threads:
                yield time_inference(pair, EngineOptions(threads=threads, precision=precision), backend, args.runs)
            if args.memory:
                options = EngineOptions(threads=max(args.threads), precision=precision)
                yield fusion_memory.measure(pair, options, backend)
    if args.training:
        for threads in args.threads:
            yield fusion_training.measure(sides, threads=threads, steps=args.steps)


def time_inference(pair: Pair, options: EngineOptions, backend: str, runs: int | None) -> dict[str, Any]:
    """One row: both sides in turns.

    Raises:
        RuntimeError: a side could not run.
    """
    runs = runs or (FEW if pair.size[0] * pair.size[1] >= LARGE else MANY)
    engine = open_engine(pair.artifact("ddsm"), backend, options)
    sampling, note = engine.sampling, engine.sampling_note  # what really runs, and what keeps it from running better
    engine.close()
    tasks = [
        Task(
            model=str(pair.files[side]),
            backend=backend,
            precision=options.precision,
            threads=options.threads,
            sampling=None,
            warm_up=10,
            images=(str(FRAME),),
        )
        for side in SIDES
    ]
    with Worker(tasks[0]) as ddsm, Worker(tasks[1]) as add:
        for start in range(0, runs, ROUND):
            for worker in (ddsm, add) if start % (2 * ROUND) else (add, ddsm):
                if not worker.error:
                    worker.round(min(ROUND, runs - start))
                if worker.error:
                    raise RuntimeError(f"{worker.task.backend} {worker.task.precision}: {worker.error}")
        times = [[inference for _, inference in worker.times] for worker in (ddsm, add)]
    return {
        "kind": "inference",
        "backend": backend,
        "precision": options.precision,
        "size": f"{pair.size[0]}x{pair.size[1]}",
        "threads": options.threads,
        "sampling": sampling,
        "sampling_note": note,
        **compare(*times),
    }


def line(row: dict[str, Any]) -> str:
    """A row for people, with the bars that hold for it and whether they are met."""
    if row["kind"] == "memory":
        bar, goal = MEMORY_BAR
        figures = f"{row['peak_mb_fused']:8.1f} MB, add {row['peak_mb_add']:8.1f} MB"
    else:
        bar, goal = BARS[row["kind"], row["backend"], row["precision"]]
        figures = f"{row['ms_fused']:8.2f} ms, add {row['ms_add']:8.2f} ms"
    met = "goal met" if row["ratio"] <= goal else "bar met" if row["ratio"] <= bar else "bar NOT met"
    what = f"{row['kind']:9} {row['backend']:11} {row['precision']:4} {row['size']:>9} {row['threads']} threads"
    return f"{what} {row['sampling']:8} {figures}, ratio {row['ratio']:.2f} (bar {bar}, goal {goal}: {met})"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ddsm-lite0", help="checkpoint, bundle or shipped name")
    parser.add_argument("--size", type=parse_size, nargs="+", default=[(360, 480)], metavar="ROWSxCOLUMNS")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--sampling", default="fused", help="form of the DDSM network: fused, portable or gather")
    parser.add_argument("--runs", type=int, help=f"a row and side (default: {MANY}, of large images {FEW})")
    parser.add_argument(
        "--only", nargs="*", help="of " + ", ".join(map("-".join, CONFIGURATIONS)) + "; none: no inference"
    )
    parser.add_argument("--training", action="store_true", help="training steps too")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps a side")
    parser.add_argument("--memory", action="store_true", help="peak memory too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
