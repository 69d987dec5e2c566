"""A page of validation frames: image, truth, prediction, errors, and where the sampler looked for a few pixels.

    python tools/val_page.py --data CAMVID -o PAGE [--model ddsm-lite0] [--frames 8] [--worst] [--dataset camvid]

Writes PAGE/index.html and a picture for each frame. Frames are taken at equal distances, or with ``--worst`` those with
the most wrong pixels. The sampling pictures show, for some pixels (circles), the N positions that the spatial branch of
stride 4 read, each dot as large as its share in the sum; they come from the checkpoint in torch, the rest from the
deployed model. A table tells of every branch how far its samples are from where they began, and how alike their shares.
The page holds frames of the data set, whose licence goes for it too.
"""

from __future__ import annotations

import argparse
import dataclasses
import html
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import IGNORE, Dataset, open_dataset
from ddsm_deploy.images import read_image
from ddsm_deploy.model import blocks
from ddsm_deploy.model.checkpoint import load_checkpoint
from ddsm_deploy.model.network import SegmentationNetwork
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import ModelSpec

Pixels = npt.NDArray[np.uint8]

Sampling = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""Offsets N×2×H×W (row, column, in cells) and shares N×H×W of one branch."""

ZOOM = 2
"""Size of a sampling picture against the frame: dots lie closer than its pixels."""

STRIDE = 4
"""Of the map whose sampling is shown."""

SHOWN = "fusions.0.spatial"
"""The branch there."""

PROBES = 7
"""Pixels whose sampling is shown in a frame."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dataset", default="camvid")
    parser.add_argument("--split", default="val")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="ddsm-lite0", help="bundle, shipped model or checkpoint")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--worst", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)

    dataset = open_dataset(args.dataset, args.data, args.split)
    network, spec = load_checkpoint(resolve(args.model).file("checkpoint"))
    network.eval()
    if SHOWN not in branches(network):
        parser.error(f"{args.model} has no spatial branch")
    with Segmenter.open(args.model) as segmenter:
        sections, samplings = [], []
        for index in chosen(segmenter, dataset, args.frames, args.worst):
            image, truth = read_image(dataset.samples[index].image), dataset.labels(index)
            result = segmenter.predict(image)
            name = dataset.samples[index].image.stem
            cv2.imwrite(str(args.output / f"{name}.png"), picture(image, truth, result))
            samplings.append(sampling(network, spec, image))
            shown = sampling_picture(samplings[-1][SHOWN], image, truth)
            cv2.imwrite(str(args.output / f"{name}.sampling.png"), shown)
            wrong = 100 * np.mean((result.mask != truth)[truth != IGNORE])
            sections.append(
                f"<h2>{html.escape(name)}: {wrong:.1f} % of the pixels wrong</h2><img src='{name}.png'>"
                f"<p>Where stride {STRIDE} looked:</p><img src='{name}.sampling.png'>"
            )
            print(f"{name}: {wrong:.1f} % wrong")
        reach = table(samplings, spec)
        print(reach)
        sections.append(f"<h2>How far samples went</h2><pre>{reach}</pre>")
        head = f"{html.escape(spec.name)} on {segmenter.backend}, {segmenter.precision}"
    page = f"<!doctype html><meta charset='utf-8'><title>{head}</title><h1>{head}</h1>{legend(spec)}{''.join(sections)}"
    (args.output / "index.html").write_text(page, encoding="utf-8")


def chosen(segmenter: Segmenter, dataset: Dataset, count: int, worst: bool) -> list[int]:
    """Indices of the frames to show."""
    every = range(len(dataset.samples))
    if not worst:
        return [int(i) for i in np.linspace(0, len(every) - 1, min(count, len(every))).round()]

    def wrong(index: int) -> float:
        truth = dataset.labels(index)
        mask = segmenter.predict(read_image(dataset.samples[index].image)).mask
        return float(np.mean((mask != truth)[truth != IGNORE]))

    return sorted(every, key=wrong, reverse=True)[:count]


def picture(image: Pixels, truth: Pixels, result: Segmentation) -> Pixels:
    """Image and truth above errors and prediction: wrong pixels in the colour of what was said, the rest pale."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    wrong = (result.mask != truth) & (truth != IGNORE)
    errors = np.where(wrong[..., None], result.color(), 170 + grey // 3)
    true_colours = dataclasses.replace(result, mask=truth).color()  # void is black
    return np.vstack([np.hstack([image, true_colours]), np.hstack([errors, result.color()])])


def table(samplings: list[dict[str, Sampling]], spec: ModelSpec) -> str:
    """Of each branch, over all frames: mean distance of a sample from its place on the regular grid; the largest such
    distance of a sample's mean place; entropy of the shares, 1 where all are equal."""
    lines = ["branch               N  moved, cells  farthest mean  entropy"]
    for name in samplings[0]:
        offsets, shares = (np.stack(part) for part in zip(*(frame[name] for frame in samplings), strict=True))
        samples = shares.shape[1]
        spacing = 1 if name.endswith("channel") else spec.network.dilation
        grid = blocks.regular_grid(samples, spacing).numpy().reshape(samples, 2, 1, 1)
        moved = offsets - grid
        distance = np.hypot(moved[:, :, 0], moved[:, :, 1]).mean()
        farthest = np.hypot(*moved.mean((0, 3, 4)).T).max()
        entropy = -(shares * np.log(shares + 1e-12)).sum(1).mean() / np.log(samples) if samples > 1 else 0.0
        lines.append(f"{name:<19}{samples:>3}{distance:>14.2f}{farthest:>15.2f}{entropy:>9.2f}")
    return "\n".join(lines)


def sampling_picture(sampled: Sampling, image: Pixels, truth: Pixels) -> Pixels:
    """The frame, enlarged, with the positions that some of its pixels read at `STRIDE`."""
    offsets, shares = sampled
    canvas = cv2.resize(image, None, fx=ZOOM, fy=ZOOM, interpolation=cv2.INTER_LINEAR)
    scale_y, scale_x = image.shape[0] / offsets.shape[2] * ZOOM, image.shape[1] / offsets.shape[3] * ZOOM
    for number, (row, column) in enumerate(probes(truth, offsets.shape[2:])):
        hue = np.array([[[180 * number // PROBES, 255, 255]]], np.uint8)
        colour = tuple(int(c) for c in cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0])
        centre = (round((column + 0.5) * scale_x), round((row + 0.5) * scale_y))
        for (dy, dx), share in zip(offsets[:, :, row, column], shares[:, row, column], strict=True):
            at = (round((column + dx + 0.5) * scale_x), round((row + dy + 0.5) * scale_y))
            cv2.line(canvas, centre, at, colour, 1, cv2.LINE_AA)
            cv2.circle(canvas, at, 2 + round(8 * float(share)), colour, -1, cv2.LINE_AA)
        cv2.circle(canvas, centre, 9, (255, 255, 255), 2, cv2.LINE_AA)
        cv2.circle(canvas, centre, 10, colour, 1, cv2.LINE_AA)
    return canvas


def probes(truth: Pixels, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Cells of the map to show: the middle one of each of the rarest classes there, by the truth."""
    rows, columns = shape
    small = cv2.resize(truth, (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
    ids, counts = np.unique(small[small != IGNORE], return_counts=True)
    found = []
    for identity in ids[np.argsort(counts)][:PROBES]:
        cells = np.argwhere(small == identity)
        found.append(tuple(int(x) for x in cells[np.abs(cells - np.median(cells, axis=0)).sum(1).argmin()]))
    return found


def sampling(network: SegmentationNetwork, spec: ModelSpec, image: Pixels) -> dict[str, Sampling]:
    """What each branch of the network sampled, by the branch's name, the coarsest first."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = blocks.dynamic_sample_attention

    def watch(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
        calls.append((query, key, offset))
        return original(query, key, value, offset)

    sized = cv2.resize(image, (spec.width, spec.height), interpolation=cv2.INTER_LINEAR)[..., ::-1]
    pixels = (sized.astype(np.float32) - np.float32(spec.mean)) / np.float32(spec.std)
    blocks.dynamic_sample_attention = watch
    try:
        with torch.inference_mode():
            network(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
    finally:
        blocks.dynamic_sample_attention = original
    return {name: positions(*call) for name, call in zip(branches(network), calls, strict=True)}


def branches(network: SegmentationNetwork) -> list[str]:
    """Names of the network's branches in the order in which they run."""
    modules = dict(network.named_modules())
    order = [f"fusions.{level}.{kind}" for level in (2, 1, 0) for kind in ("channel", "spatial")]
    return [name for name in order if modules.get(name) is not None]


def positions(query: Tensor, key: Tensor, offset: Tensor) -> Sampling:
    """Inputs of the operator, batch 1 -> offsets and shares."""
    _, channels, rows, columns = key.shape
    samples = offset.shape[1] // 2
    offset = offset.view(samples, 2, rows, columns)
    at_y = torch.arange(rows).view(1, -1, 1) + offset[:, 0]
    at_x = torch.arange(columns).view(1, 1, -1) + offset[:, 1]
    grid = torch.stack([(2 * at_x + 1) / columns - 1, (2 * at_y + 1) / rows - 1], -1)
    keys = F.grid_sample(key.expand(samples, -1, -1, -1), grid, align_corners=False)
    shares = ((keys * query).sum(1) / channels**0.5).softmax(0)
    return offset.numpy(), shares.numpy()


def legend(spec: ModelSpec) -> str:
    """Names of the classes in their colours, and what the four panels are."""
    marks = " ".join(
        f"<span style='background:rgb{colour};padding:2px 8px'>&nbsp;</span> {html.escape(name)}"
        for name, colour in zip(spec.classes, spec.palette, strict=True)
    )
    return f"<p>{marks}</p><p>Image, truth; errors (in the colour of the class that was said), prediction.</p>"


if __name__ == "__main__":
    main()
