"""Memory over an hour's worth of frames through `Segmenter.stream`, as a curve.

    python benchmarks/stream_memory.py [--frames 108000] [--precision int8] [--plot FILE.png] [--json FILE]

108,000 frames are an hour at 30 a second; they run as fast as the machine lets them. The frames are copies of the
example frames, each a new array, as a camera gives them. Resident memory is read every 500 frames; growth is the
difference between the medians of the last and the second tenth of the readings, the first tenth being warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from ddsm_deploy.frames import images_in
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.segmenter import Segmenter

EVERY = 500
PAGE = 4096  # bytes; of Linux on x86-64 and most ARM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=Path(__file__).parent.parent / "examples" / "frames")
    parser.add_argument("--frames", type=int, default=108_000)
    parser.add_argument("--model", default="ddsm-lite0")
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pictures = [cv2.resize(read_image(path), (480, 360)).astype(np.uint8) for path in images_in(args.images)]

    def camera() -> Iterator[Image]:
        for index in range(args.frames):
            yield pictures[index % len(pictures)].copy()

    curve: list[tuple[int, float]] = []
    begin = time.perf_counter()
    with Segmenter.open(args.model, backend=args.backend, precision=args.precision) as segmenter:
        for frame, _ in segmenter.stream(camera()):
            if frame.index % EVERY == 0:
                curve.append((frame.index, resident_mb()))
        label = segmenter.label
    seconds = time.perf_counter() - begin
    tenth = max(1, len(curve) // 10)
    growth = statistics.median(mb for _, mb in curve[-tenth:]) - statistics.median(
        mb for _, mb in curve[tenth : 2 * tenth]
    )
    result = {
        "backend": label,
        "frames": args.frames,
        "fps": args.frames / seconds,
        "rss_growth_mb": growth,
        "rss_mb": [round(mb, 2) for _, mb in curve],
    }
    print(f"{label}: {args.frames} frames, {result['fps']:.1f} FPS, {curve[-1][1]:.1f} MB, growth {growth:+.2f} MB")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(curve, label, args.plot)


def resident_mb() -> float:
    """Resident memory of this process, 10⁶ bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6


def plot(curve: list[tuple[int, float]], label: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([frame / 30 / 60 for frame, _ in curve], [mb for _, mb in curve])
    axes.set(xlabel="minutes of frames at 30 a second", ylabel="resident memory, MB", title=label)
    axes.set_ylim(0, 1.25 * max(mb for _, mb in curve))  # from zero, so that a leak of a few per cent is seen as that
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
