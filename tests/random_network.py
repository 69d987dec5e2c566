"""Random networks as checkpoints and as ONNX, each made once for all processes of a run."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ddsm_deploy.export import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.model.checkpoint import save_checkpoint
from ddsm_deploy.model.network import build_network
from ddsm_deploy.spec import ModelSpec, NetworkConfig

Shared = Callable[[str, Callable[[Path], None]], Path]
"""The fixture of that name."""

SPEC = ModelSpec(
    name="random",
    classes=tuple("abcdefghijk"),
    height=64,
    width=96,
    mean=(123.7, 116.3, 103.5),  # unlike each other, so that a swapped channel shows
    std=(58.4, 50.0, 64.0),
    network=NetworkConfig(backbone="test_efficientnet", channels=16, sample_channels=8, samples=9, pooled=4),
)


def random_network(config: NetworkConfig) -> nn.Module:
    """Every gate open, every norm with statistics of its own, logits far apart: nothing that could hide an error."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = build_network(config, len(SPEC.classes))
        for name, parameter in network.named_parameters():
            if name.endswith("offset.weight"):
                nn.init.normal_(parameter, std=0.1)
            elif name.startswith("fusions") and name.endswith("weight") and not parameter.any():
                nn.init.uniform_(parameter, 0.5, 1.0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.0)
        nn.init.normal_(network.head[1].weight)
        network.train()
        with torch.no_grad():
            for _ in range(20):  # the norms take up the statistics of what flows through them
                network(torch.randn(4, 3, 64, 96))
    return network.eval()


def checkpoint_of(shared: Shared, network: str, *, half: bool = False) -> Path:
    """A random network's checkpoint. `network` is a fusion, or ``detail``: both branches, the level at stride 2, and a
    larger image inside."""
    name = f"{network}{'-half' * half}.safetensors"

    def make(folder: Path) -> None:
        changes = {"detail": 8, "enlarge": 1.5} if network == "detail" else {"fusion": network}
        config = NetworkConfig(**{**vars(SPEC.network), **changes})
        save_checkpoint(folder / name, random_network(config), SPEC.replace(network=config), half=half)

    return shared(f"checkpoint-{name}", make) / name


def export_of(shared: Shared, network: str, *, half: bool = False, **options: object) -> ExportReport:
    """The report of that checkpoint's export with these `ExportOptions`."""
    key = repr((network, half, sorted(options.items())))

    def make(folder: Path) -> None:
        source = checkpoint_of(shared, network, half=half)
        report = export_onnx(source, folder / "model.onnx", ExportOptions(**options))
        (folder / "report").write_bytes(pickle.dumps(report))

    folder = shared(f"export-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
    report = pickle.loads((folder / "report").read_bytes())
    return dataclasses.replace(report, path=folder / "model.onnx")
