"""What each part of DDSM brings: the same training, part by part, with several seeds.

    python benchmarks/ablation.py --data CAMVID -o RUNS [--epochs 10] [--seeds 0 1 2] [--only plain …] [--parallel 1]
        [--enlarge 1.5 --crop 240 320 --scale 0.7 1.7] [--hold 0001TP] [--strong-photometric 1]

Trains each row of `ROWS` with each seed by the same recipe and budget, and scores the *last* epoch's weights on val
(so val chooses nothing): mIoU and boundary F at 3 px. The options of the second line are those by which
`ddsm-lite0-large` was trained; another recipe wants another RUNS. Latency is that of the network on OpenVINO, bf16,
untrained, and is measured apart (``--latency``), since training beside it would spoil it. What is done already in
RUNS is not done again, and a run that was cut off goes on, so the command may be stopped and repeated. `--parallel`
trains several at once, for a GPU that one of these small networks leaves idle. Writes RUNS/ablation.json and prints a
table of means and standard deviations over the seeds.

With `--hold` one of CamVid's drives (its frames' names begin so) is left out of the training and takes the place of
val, whose own score is printed too. For val is of a drive that train holds as well, and says little of others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import camvid_classes, open_dataset
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.evaluate.accuracy import evaluate
from ddsm_deploy.export import ExportOptions, export_onnx
from ddsm_deploy.frames import frames_of
from ddsm_deploy.images import read_image
from ddsm_deploy.model.checkpoint import save_checkpoint
from ddsm_deploy.model.network import build_network
from ddsm_deploy.model.variants import VARIANTS
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec, NetworkConfig
from ddsm_deploy.train import TrainConfig, train
from ddsm_deploy.train.files import LAST

LATENCY_RUNS = 100

# name -> changes of the network, changes of the training
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"fusion": "add"}, {}),
    "both": ({}, {}),
    "spatial": ({"fusion": "spatial"}, {}),
    "channel": ({"fusion": "channel"}, {}),
    "both, N=4": ({"samples": 4}, {}),
    "both, N=16": ({"samples": 16}, {}),
    "both, fixed offsets": ({}, {"offset_lr": 0.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CamVid's folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--variant", default="ddsm-lite0")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--crop", type=int, nargs=2, default=(360, 480), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--scale", type=float, nargs=2, default=(0.75, 2.0), metavar=("LEAST", "GREATEST"))
    parser.add_argument("--strong-photometric", type=float, default=0.0, help="the rows in the log had none")
    parser.add_argument("--enlarge", type=float, default=1.0, help="of the network; crops are of the image as it comes")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--ema", type=float, default=0.98, help="short runs want a short average")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--workers", type=int, default=2, help="processes that load and augment, of each run")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--latency", action="store_true", help="time each row's network; train none")
    parser.add_argument("--hold", metavar="DRIVE", help="train without this drive, and score on it")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    args.val = args.data
    if args.hold:
        args.data = without_drive(args.data, args.hold, args.output / f"data-{args.hold}")
    record = args.output / "ablation.json"
    results: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    if args.latency:
        for name, ms in latencies(args).items():
            print(f"{name}: {ms:.1f} ms")
            for result in results:
                if result["row"] == name:
                    result["latency_ms"] = ms
        record.write_text(json.dumps(results, indent=2) + "\n")
    else:
        if any(result.get("hold") != args.hold for result in results):
            parser.error(f"{record} is of another --hold; take another RUNS")
        done = {(result["row"], result["seed"]) for result in results}
        # all rows of one seed first: a stopped ablation still compares like with like
        left = [(name, seed) for seed in args.seeds for name in args.only if (name, seed) not in done]
        spawn = multiprocessing.get_context("spawn")  # CUDA survives no fork
        with concurrent.futures.ProcessPoolExecutor(args.parallel, spawn, max_tasks_per_child=1) as pool:
            for future in concurrent.futures.as_completed(pool.submit(one, args, *run) for run in left):
                results.append(future.result())
                record.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


def without_drive(data: Path, drive: str, folder: Path) -> Path:
    """CamVid in links: train without one drive, whose frames are val."""
    if not any(path.name.startswith(drive) for path in (data / "train").iterdir()):
        raise SystemExit(f"no frame of {data / 'train'} is of a drive {drive}")
    for kind in ("", "annot"):
        for source in (data / f"train{kind}").resolve().iterdir():
            part = "val" if source.name.startswith(drive) else "train"
            link = folder / f"{part}{kind}" / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(source)
    return folder


def one(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    """Trains and scores one row with one seed."""
    training = ROWS[name][1]
    folder = run_folder(args, name, seed)
    config = TrainConfig(
        data=args.data,
        output=folder,
        network=network_of(args, name),
        epochs=args.epochs,
        validate_every=args.epochs,  # the last alone, whose score has to be
        crop=tuple(args.crop),
        scale=tuple(args.scale),
        strong_photometric=args.strong_photometric,
        batch=args.batch,
        lr=args.lr,
        ema=args.ema,
        workers=args.workers,
        seed=seed,
        resume=(folder / LAST).exists(),
        **training,
    )
    start = time.perf_counter()
    final = train(config).final
    minutes = (time.perf_counter() - start) / 60
    with Segmenter.open(final, backend="torch", precision="fp32", threads=2) as segmenter:
        score = evaluate(segmenter, open_dataset("camvid", args.data, "val"))
        val = evaluate(segmenter, open_dataset("camvid", args.val, "val")) if args.hold else score
    text = f"{name}, seed {seed}: mIoU {score.miou:.2f}, boundary F {score.boundary_f:.2f}, {minutes:.0f} min"
    print(text + (f"; on val {val.miou:.2f}, {val.boundary_f:.2f}" if args.hold else ""), flush=True)
    return {
        "row": name,
        "seed": seed,
        "epochs": args.epochs,
        "miou": score.miou,
        "boundary_f": score.boundary_f,
        "per_class": dict(score.per_class),
        "val_miou": val.miou,
        "hold": args.hold,
        "minutes": minutes,
    }


def latencies(args: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each row's network on OpenVINO in bf16, bytes to class ids, two threads, rows in turns.

    Untrained: weights change the numbers, not the work, but for where samples lie.
    """
    frame = read_image(next(iter(frames_of(open_dataset("camvid", args.data, "val")))).path)[None]
    times: dict[str, list[float]] = {name: [] for name in args.only}
    with contextlib.ExitStack() as stack:
        options = EngineOptions(precision="bf16", threads=2)
        engines = [
            (name, stack.enter_context(open_engine(resolve(untrained(args, name)), "openvino", options)))
            for name in args.only
        ]
        for _ in range(LATENCY_RUNS):
            for name, engine in engines:
                start = time.perf_counter()
                engine.run({"image": frame})
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def untrained(args: argparse.Namespace, name: str) -> Path:
    """A row's network as it begins, exported with fused sampling."""
    checkpoint = args.output / "untrained.safetensors"
    classes = camvid_classes()
    config = network_of(args, name)
    spec = ModelSpec(name="row", classes=classes.names, palette=classes.palette, height=360, width=480, network=config)
    torch.manual_seed(0)
    save_checkpoint(checkpoint, build_network(config, len(classes.names)), spec)
    model: Path = args.output / f"{run_folder(args, name, 0).name}.onnx"
    export_onnx(checkpoint, model, ExportOptions(sampling="fused", verify=False))
    return model


def network_of(args: argparse.Namespace, name: str) -> NetworkConfig:
    """A row's network."""
    return dataclasses.replace(VARIANTS[args.variant], enlarge=args.enlarge, **ROWS[name][0])


def run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    """Where a row's training with a seed lies."""
    folder: Path = args.output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    return folder


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: mean ± standard deviation over the seeds."""
    lines = ["| row | seeds | mIoU | boundary F | latency, ms |", "| --- | --- | --- | --- | --- |"]
    for name in ROWS:
        rows = [result for result in results if result["row"] == name]
        if rows:
            scores = " | ".join(_spread([row[key] for row in rows]) for key in ("miou", "boundary_f"))
            ms = rows[0].get("latency_ms")
            lines.append(f"| {name} | {len(rows)} | {scores} | {'–' if ms is None else f'{ms:.1f}'} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
