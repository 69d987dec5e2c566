"""Calls of the sampling operator as ONNX: several in one file through the exporter, or a fused one by hand."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ddsm_deploy.export.sampling import translation_table
from ddsm_deploy.export.sampling_function import PLUGIN, VERSION, attach_body, sampling_function
from ddsm_deploy.model.operator import dynamic_sample_attention
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP


class Calls(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(dynamic_sample_attention(*tensors[i : i + 4]) for i in range(0, len(tensors), 4))


def inputs(case: tuple[int, int, int, int, int, int, float]) -> list[Tensor]:
    b, k, v, n, y, x, spread = case
    generator = torch.Generator().manual_seed(1000 * n + 10 * y + x)
    shapes = [(b, k, y, x), (b, k, y, x), (b, v, y, x), (b, 2 * n, y, x)]
    query, key, value, offset = (torch.randn(s, generator=generator) for s in shapes)
    return [query, key, value, offset * spread]


def export(sampling: str, cases: list[tuple[int, int, int, int, int, int, float]], *, axes: tuple[int, ...]) -> bytes:
    tensors = [tensor for case in cases for tensor in inputs(case)]
    shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in tensors),) if axes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            Calls().eval(),
            tuple(tensors),
            dynamo=True,
            opset_version=19,
            input_names=[f"in{i}" for i in range(len(tensors))],
            dynamic_shapes=shapes,
            custom_translation_table=translation_table(sampling),
            verbose=False,
        )
    model = program.model_proto
    attach_body(model)
    return model.SerializeToString()


def one_node(case: tuple[int, int, int, int, int, int, float], *, axes: tuple[int, ...] = ()) -> onnx.ModelProto:
    """A fused call with a 1×1 convolution to 3 channels behind it, written by hand; `axes` of in0 to in3 are open."""
    b, k, v, n, y, x, _ = case
    names = ["in0", "in1", "in2", "in3"]
    inputs = [
        helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["BCYX"[axis] if axis in axes else size for axis, size in enumerate((b, c, y, x))]
        )
        for name, c in zip(names, (k, k, v, 2 * n), strict=True)
    ]
    weight = np.random.default_rng(k + v).normal(size=(3, v, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node(SAMPLING_OP, names, ["attended"], name="call", domain=SAMPLING_DOMAIN, samples=n, **PLUGIN),
        helper.make_node("Conv", ["attended", "weight"], ["mixed"], name="mix"),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in ("attended", "mixed")]
    graph = helper.make_graph(nodes, "one", inputs, outputs, [numpy_helper.from_array(weight, "weight")])
    imports = [helper.make_opsetid("", 19), helper.make_opsetid(SAMPLING_DOMAIN, VERSION)]
    return helper.make_model(graph, functions=[sampling_function()], opset_imports=imports, ir_version=10)
