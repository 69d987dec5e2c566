"""The tiny network of the tests, fitted to rendered scenes for some seconds.

That gives masks with clear borders and honest margins, so that backends are compared on something better than noise.
Every learned gate is opened first: with the zeros they start from, the two sampling branches would contribute little,
and a wrong export of them would pass.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ddsm_deploy.datasets import IGNORE, open_dataset
from ddsm_deploy.images import read_image
from ddsm_deploy.model.checkpoint import save_checkpoint
from ddsm_deploy.model.network import SegmentationNetwork, build_network
from ddsm_deploy.spec import ModelSpec, NetworkConfig

CONFIG = NetworkConfig(backbone="test_efficientnet", channels=16, sample_channels=8, pooled=4)


def write_tiny_checkpoint(path: Path, *, scenes: Path, size: tuple[int, int]) -> None:
    """Builds, fits and saves the tiny network; `size` is its input's height and width."""
    dataset = open_dataset("folder", scenes, "")
    images, labels = [], []
    for index, sample in enumerate(dataset.samples):
        bgr = cv2.resize(read_image(sample.image), size[::-1], interpolation=cv2.INTER_AREA)
        images.append(torch.from_numpy((bgr[..., ::-1].astype(np.float32) - 127) / 128).permute(2, 0, 1))
        labels.append(torch.from_numpy(cv2.resize(dataset.labels(index), size[::-1], interpolation=cv2.INTER_NEAREST)))

    with torch.random.fork_rng():
        torch.manual_seed(20)
        network = build_network(CONFIG, len(dataset.classes.names))
        _open_gates(network)
        _fit(network, torch.stack(images), torch.stack(labels).long())
    spec = ModelSpec(
        name="tiny",
        classes=dataset.classes.names,
        palette=dataset.classes.palette,
        height=size[0],
        width=size[1],
        network=CONFIG,
    )
    save_checkpoint(path, network.eval(), spec)


def _open_gates(network: SegmentationNetwork) -> None:
    for name, parameter in network.named_parameters():
        if name.startswith("fusions") and not parameter.any():
            if name.endswith("offset.weight"):
                nn.init.normal_(parameter, std=0.1)
            elif name.endswith(".weight"):
                nn.init.constant_(parameter, 0.7)


def _fit(network: SegmentationNetwork, images: torch.Tensor, labels: torch.Tensor) -> None:
    network.train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(50):
        batch = torch.arange(step % 2, len(images), 2)
        loss = F.cross_entropy(network(images[batch]), labels[batch], ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
