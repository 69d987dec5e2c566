"""What a constant added to one class's logit gives: its IoU, precision and recall, mIoU and boundary F, by offset.

    python benchmarks/class_offset.py CHECKPOINT --data CAMVID [--class pole] [--offsets 0 0.5 1] [--drive 0001TP]

A thin class that is hard to see is seldom the likeliest one where it is, so the plain argmax finds little of it; its
IoU is best where what is gained in recall is paid for in precision. `--drive` scores on that drive's frames of *train*:
for a network of `benchmarks/ablation.py --hold DRIVE`, which has not seen them. Otherwise on *val*.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import torch

from ddsm_deploy.datasets import Dataset, open_dataset
from ddsm_deploy.evaluate.metrics import BoundaryScore, ConfusionMatrix
from ddsm_deploy.images import read_image
from ddsm_deploy.model.checkpoint import load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--class", dest="name", default="pole")
    parser.add_argument("--offsets", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--drive", default="", help="beginning of the frames' names; then of train, not of val")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    scores = scored(args.checkpoint, chosen(args.data, args.drive), args.name, args.offsets)
    print("| offset | IoU | precision | recall | mIoU | boundary F |\n| --- | --- | --- | --- | --- | --- |")
    for offset, row in zip(args.offsets, scores, strict=True):
        print(f"| {offset:+.2f} | " + " | ".join(f"{100 * value:.1f}" for value in row) + " |")


def chosen(data: Path, drive: str) -> Dataset:
    """Val, or the frames of one drive of train."""
    dataset = open_dataset("camvid", data, "train" if drive else "val")
    samples = tuple(sample for sample in dataset.samples if sample.image.name.startswith(drive))
    return dataclasses.replace(dataset, samples=samples)


@torch.inference_mode()
def scored(checkpoint: Path, dataset: Dataset, name: str, offsets: list[float]) -> list[tuple[float, ...]]:
    """IoU, precision and recall of the class, mIoU and boundary F, for each offset."""
    network, spec = load_checkpoint(checkpoint)
    which = spec.classes.index(name)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    counts = [(ConfusionMatrix(len(spec.classes)), BoundaryScore(len(spec.classes))) for _ in offsets]
    for index, sample in enumerate(dataset.samples):
        rgb = np.ascontiguousarray(read_image(sample.image)[:, :, ::-1])
        image = torch.from_numpy(rgb).permute(2, 0, 1).unsqueeze(0)
        logits = network((image - mean) / std)[0]
        for offset, (matrix, boundary) in zip(offsets, counts, strict=True):
            moved = logits.clone()
            moved[which] += offset
            mask = moved.argmax(0).numpy().astype(np.uint8)
            truth = dataset.labels(index)
            matrix.update(truth, mask)
            boundary.update(truth, mask)
    rows = []
    for matrix, boundary in counts:
        hits, truth, found = matrix.counts[which, which], matrix.counts[which].sum(), matrix.counts[:, which].sum()
        own = (matrix.iou()[which], hits / max(found, 1), hits / max(truth, 1))
        rows.append((*map(float, own), matrix.miou(), boundary.score()))
    return rows


if __name__ == "__main__":
    main()
