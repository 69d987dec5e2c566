"""Random networks, exported once each, and the two runtimes that read ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from random_network import checkpoint_of, export_of

from ddsm_deploy.export import ExportReport
from ddsm_deploy.export.sampling_function import inline_sampling

Feeds = Mapping[str, npt.NDArray]
Runner = Callable[[Feeds], list[npt.NDArray]]


@pytest.fixture(scope="session")
def checkpoint(shared) -> Callable[..., Path]:
    """`checkpoint(network, half=False)`: see `checkpoint_of`."""
    return functools.partial(checkpoint_of, shared)


@pytest.fixture(scope="session")
def exported(shared) -> Callable[..., ExportReport]:
    """`exported(network, half=False, **options)`: see `export_of`."""
    return functools.partial(export_of, shared)


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
