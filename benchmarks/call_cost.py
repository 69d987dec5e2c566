"""What one call of the fused operator costs inside a runtime, beyond the kernel's own time.

    python benchmarks/call_cost.py [--runs 300]

Two graphs, one of a single call and one of a chain of `CHAIN` calls, each fed by the one before, run in turns on ONNX
Runtime and OpenVINO, one thread. Their difference, shared among the calls, is what a call takes there; beside it
stands the same call of the kernel from Python, whose ctypes cost about as much as a small call itself. The shape is the
channel branch's, the smallest that the network has. Medians; let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from fusion_support import announce_machine
from onnx import TensorProto, helper

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.export.sampling_function import VERSION, sampling_function
from ddsm_deploy.model import fused
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP
from ddsm_deploy.spec import ModelSpec

K = V = 64
SAMPLES, SIDE = 9, 8
CHAIN = 41
SHAPES = {"query": K, "key": K, "value": V, "offset": 2 * SAMPLES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    args = parser.parse_args()
    announce_machine()
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(1, c, SIDE, SIDE)).astype(np.float32) for name, c in SHAPES.items()}

    spec = ModelSpec(classes=("one",), provenance={"sampling": "fused"})
    torch.set_num_threads(1)
    tensors = [torch.from_numpy(feed) for feed in feeds.values()]
    (kernel,) = medians([lambda: fused.forward(*tensors)], args.runs)
    print(f"kernel from Python: {1e6 * kernel:.1f} µs a call")
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("onnxruntime", "openvino"):
            engines = []
            for calls in (1, CHAIN):
                path = Path(folder) / f"{calls}.onnx"
                onnx.save(chain(calls), path)
                artifact = Artifact("chain", spec, {"onnx": path})
                engines.append(open_engine(artifact, backend, EngineOptions(threads=1, precision="fp32")))
            assert all(engine.sampling == "fused" for engine in engines)
            one, many = medians([lambda engine=engine: engine.run(feeds) for engine in engines], args.runs)
            print(f"{backend}: {1e6 * (many - one) / (CHAIN - 1):.1f} µs a call; a run of one call {1e6 * one:.0f} µs")
            for engine in engines:
                engine.close()


def chain(calls: int) -> onnx.ModelProto:
    """A graph of so many calls; the value of each is the result of the one before."""
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels, SIDE, SIDE])
        for name, channels in SHAPES.items()
    ]
    names = ["value", *(f"value_{i}" for i in range(1, calls)), "mask"]
    nodes = [
        helper.make_node(
            SAMPLING_OP, ["query", "key", a, "offset"], [b], name=b, domain=SAMPLING_DOMAIN, samples=SAMPLES
        )
        for a, b in itertools.pairwise(names)
    ]
    output = helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, V, SIDE, SIDE])
    graph = helper.make_graph(nodes, "chain", inputs, [output])
    imports = [helper.make_opsetid("", 19), helper.make_opsetid(SAMPLING_DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[sampling_function()], opset_imports=imports, ir_version=10)


def medians(calls: list[Callable[[], object]], runs: int) -> list[float]:
    """Median seconds of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 20):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent[20:]) for spent in times]


if __name__ == "__main__":
    main()
