"""`ddsm train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    data: Annotated[Path, typer.Option(help="Root folder of the data set.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run: logs, checkpoints.")],
    dataset: Annotated[str, typer.Option(help="Layout of the data: camvid, cityscapes or folder.")] = "camvid",
    train_split: Annotated[str, typer.Option(help="Split to learn from; train+val for both.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split to validate on.")] = "val",
    variant: Annotated[
        str, typer.Option(help="Network: ddsm-lite0, ddsm-lite2, ddsm-r18, ddsm-r50, ddsm-r101, fpn-lite0…")
    ] = "ddsm-lite0",
    backbone: Annotated[str | None, typer.Option(help="Any timm backbone, in place of the variant's.")] = None,
    fusion: Annotated[str | None, typer.Option(help="ddsm, spatial, channel, or add (no DDSM).")] = None,
    samples: Annotated[int | None, typer.Option(help="N, sampled positions a pixel.")] = None,
    detail: Annotated[int | None, typer.Option(help="Channels of the level at stride 2; 0 leaves it out.")] = None,
    enlarge: Annotated[float | None, typer.Option(help="Enlarge images by this inside the network, 1 to 4.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint or shipped model with the same backbone to start from.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint or shipped model of the same classes to learn from besides labels.")
    ] = None,
    distill: Annotated[float, typer.Option(help="Weight of the distance from the teacher.")] = 4.0,
    pretrained: Annotated[bool, typer.Option(help="Start the backbone from ImageNet weights.")] = True,
    size: Annotated[str, typer.Option(help="Deployed input, HEIGHTxWIDTH.")] = "360x480",
    crop: Annotated[str | None, typer.Option(help="Training crop, HEIGHTxWIDTH; the size if left out.")] = None,
    scale: Annotated[tuple[float, float], typer.Option(help="Least and greatest random scale.")] = (0.75, 2.0),
    rare_crops: Annotated[float, typer.Option(help="Share of crops laid around a pixel of a rare class.")] = 0.5,
    strong_photometric: Annotated[
        float, typer.Option(help="Share of crops as if of another time of day, weather or camera.")
    ] = 0.5,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 60,
    validate_every: Annotated[int, typer.Option(help="Epochs from one validation to the next; divides --epochs.")] = 1,
    batch: Annotated[int, typer.Option(help="Images a step and device.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    backbone_lr: Annotated[float, typer.Option(help="Its multiple for the backbone.")] = 0.5,
    ema: Annotated[float, typer.Option(help="Decay of the averaged weights; 0 switches them off.")] = 0.995,
    ohem: Annotated[float, typer.Option(help="Probability from which a pixel counts as easy; 0 keeps all.")] = 0.7,
    jaccard: Annotated[float, typer.Option(help="Weight of the soft Jaccard loss.")] = 0.5,
    class_weights: Annotated[
        str, typer.Option(help="sqrt (rare classes weigh more), none, or fade from one to the other.")
    ] = "fade",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that load and augment.")] = 2,
    devices: Annotated[str, typer.Option(help="How many devices, or auto.")] = "auto",
    accelerator: Annotated[str, typer.Option(help="auto, cpu, gpu…")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
) -> None:
    """Trains a network; keeps the best checkpoint by validation mIoU."""
    import dataclasses

    from ddsm_deploy.cli.render import require
    from ddsm_deploy.errors import ConfigError
    from ddsm_deploy.model.variants import VARIANTS
    from ddsm_deploy.spec import parse_size
    from ddsm_deploy.train import TrainConfig
    from ddsm_deploy.train import train as run

    if variant not in VARIANTS:
        raise ConfigError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    changes: dict[str, Any] = {
        "backbone": backbone,
        "fusion": fusion,
        "samples": samples,
        "detail": detail,
        "enlarge": enlarge,
    }
    network = dataclasses.replace(VARIANTS[variant], **{k: v for k, v in changes.items() if v is not None})
    height, width = parse_size(size)
    config = TrainConfig(
        data=data,
        output=output,
        dataset=dataset,
        train_split=train_split,
        val_split=val_split,
        network=network,
        init=init,
        teacher=teacher,
        distill=distill,
        pretrained=pretrained,
        height=height,
        width=width,
        crop=parse_size(crop) if crop else (height, width),
        scale=scale,
        rare_crops=rare_crops,
        strong_photometric=strong_photometric,
        epochs=epochs,
        validate_every=validate_every,
        batch=batch,
        lr=lr,
        backbone_lr=backbone_lr,
        ema=ema,
        ohem=ohem,
        jaccard=jaccard,
        class_weights=class_weights,
        precision=precision,
        workers=workers,
        devices=devices,
        accelerator=accelerator,
        seed=seed,
        resume=resume,
    )
    with require("train"):
        result = run(config, lambda text: print(text, file=sys.stderr))
    if int(os.environ.get("LOCAL_RANK", "0")):  # one process of several tells
        return
    print(f"best: {result.checkpoint} (val mIoU {result.miou:.2f}, epoch {result.epoch})")
    print(f"last: {result.final} (val mIoU {result.final_miou:.2f})")
