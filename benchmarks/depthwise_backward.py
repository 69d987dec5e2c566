"""What the gradients of depthwise convolutions cost in bfloat16 and by way of float32, on the CPU.

    python benchmarks/depthwise_backward.py [--threads 2] [--runs 9]

The shapes are those of EfficientNet-Lite0 at 360×480, a batch of 8, channels last. The two sides alternate; times are
medians and hold the conversions. See `ddsm_deploy.train.depthwise`. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from torch import nn

from ddsm_deploy.train.depthwise import DepthwiseConv2d

SHAPES = (  # channels, rows, columns, kernel, stride
    (32, 180, 240, 3, 1),
    (96, 180, 240, 3, 2),
    (144, 90, 120, 3, 1),
    (144, 90, 120, 5, 2),
    (240, 45, 60, 5, 1),
    (240, 45, 60, 3, 2),
    (480, 23, 30, 5, 1),
    (672, 23, 30, 5, 2),
    (1152, 12, 15, 5, 1),
)
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {args.threads} threads, load average {load:.2f} at the start")
    print("channels  rows  columns  kernel  stride   torch's ms   in float32   ratio")
    for channels, rows, columns, kernel, stride in SHAPES:
        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        plain = nn.Sequential(conv).to(memory_format=torch.channels_last)
        same = DepthwiseConv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
        own = nn.Sequential(same).to(memory_format=torch.channels_last)
        image = torch.randn(BATCH, channels, rows, columns).bfloat16().to(memory_format=torch.channels_last)
        times: dict[str, list[float]] = {"plain": [], "own": []}
        for _ in range(args.runs + 1):
            for name, network in (("plain", plain), ("own", own)):
                times[name].append(_backward_ms(network, image))
        a, b = (statistics.median(times[name][1:]) for name in ("plain", "own"))
        print(f"{channels:8} {rows:5} {columns:8} {kernel:7} {stride:7} {a:12.1f} {b:12.1f} {a / b:7.2f}")


def _backward_ms(network: nn.Module, image: torch.Tensor) -> float:
    x = image.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    grad = torch.ones_like(y)
    start = time.perf_counter()
    y.backward(grad)
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
