"""Random networks as checkpoints, exported once each, and the two runtimes that read ONNX."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from torch import nn

from ddsm_deploy.export import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.model.checkpoint import save_checkpoint
from ddsm_deploy.model.network import build_network
from ddsm_deploy.spec import ModelSpec, NetworkConfig

Feeds = Mapping[str, npt.NDArray]
Runner = Callable[[Feeds], list[npt.NDArray]]

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


@pytest.fixture(scope="session")
def checkpoint(shared) -> Callable[..., Path]:
    """`checkpoint(network, half=False)`: a random network's checkpoint, made once. `network` is a fusion, or
    ``detail``: both branches, the level at stride 2, and a larger image inside."""

    def made(network: str, *, half: bool = False) -> Path:
        name = f"{network}{'-half' * half}.safetensors"

        def make(folder: Path) -> None:
            changes = {"detail": 8, "enlarge": 1.5} if network == "detail" else {"fusion": network}
            config = NetworkConfig(**{**vars(SPEC.network), **changes})
            save_checkpoint(folder / name, random_network(config), SPEC.replace(network=config), half=half)

        return shared(f"checkpoint-{name}", make) / name

    return made


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[..., Path], shared) -> Callable[..., ExportReport]:
    """`exported(network, half=False, **options)`: the report of an export, made once for each set of arguments."""

    def made(network: str, *, half: bool = False, **options: object) -> ExportReport:
        key = repr((network, half, sorted(options.items())))

        def make(folder: Path) -> None:
            report = export_onnx(checkpoint(network, half=half), folder / "model.onnx", ExportOptions(**options))
            (folder / "report").write_bytes(pickle.dumps(report))

        folder = shared(f"export-{hashlib.sha256(key.encode()).hexdigest()[:16]}", make)
        report = pickle.loads((folder / "report").read_bytes())
        return dataclasses.replace(report, path=folder / "model.onnx")

    return made


def onnxruntime_runner(model: Path | bytes) -> Runner:
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, dict(feeds))


def openvino_runner(model: Path | bytes) -> Runner:
    """OpenVINO's ONNX reader knows no functions, so a fused model is written out for it."""
    import openvino

    graph = onnx.load_from_string(model if isinstance(model, bytes) else model.read_bytes())
    core = openvino.Core()
    source = core.read_model(inline_sampling(graph).SerializeToString())
    compiled = core.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def infer(feeds: Feeds) -> list[npt.NDArray]:
        results = compiled(dict(feeds))
        return [np.array(results[port]) for port in compiled.outputs]

    return infer


@pytest.fixture(params=["onnxruntime", "openvino"])
def run(
    request: pytest.FixtureRequest, need: Callable[[str], None]
) -> Callable[[Path | bytes, Feeds], list[npt.NDArray]]:
    """`run(model, feeds)`: the outputs in the graph's order, on each runtime, which loads a model once in a test."""
    need(request.param)
    runner = functools.cache({"onnxruntime": onnxruntime_runner, "openvino": openvino_runner}[request.param])
    return lambda model, feeds: runner(model)(feeds)
