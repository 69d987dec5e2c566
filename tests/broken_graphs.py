"""Surgery on deployed ONNX files: the mistakes that converters and runtimes make in silence, made on purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ddsm_deploy.export.sampling_function import inline_sampling
from ddsm_deploy.spec import METADATA_KEY, ModelSpec


def swapped_axes(source: Path, path: Path) -> Path:
    """Every GridSample gets its coordinates as (y, x) where the operator wants (x, y)."""
    model = inline_sampling(onnx.load(source))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 0], np.int64), "yx"))
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "GridSample":
            grid = node.input[1]
            nodes.append(helper.make_node("Gather", [grid, "yx"], [f"{grid}_yx"], axis=3))
            node.input[1] = f"{grid}_yx"
        nodes.append(node)
    return _saved(model, nodes, path)


def wrong_normalisation(source: Path, path: Path) -> Path:
    """Pixels divided by 255 where the network was trained on (pixel - mean) / std."""
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name in ("mean", "scale"):
            value = numpy_helper.to_array(tensor)
            other = np.zeros_like(value) if tensor.name == "mean" else np.full_like(value, 1 / 255)
            tensor.CopyFrom(numpy_helper.from_array(other, tensor.name))
    return _saved(model, list(model.graph.node), path)


def quantized(source: Path, path: Path, *, kind: int = TensorProto.UINT8) -> Path:
    """Q/DQ pairs at zero point 0 behind every ReLU6, whose range is known without calibration: 0 to 6 over 255 steps.

    With ``kind`` INT8 it is what a runtime computes that takes those unsigned bytes for signed ones: the upper half of
    the range is cut off. The weights of the convolutions behind them are int8, a scale each channel; left in float,
    ONNX Runtime (1.32) would quantize them by itself, one scale for all of them.
    """
    model = onnx.load(source)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in stored}
    zero = np.array(0, helper.tensor_dtype_to_np_dtype(kind))
    added = {"step": np.array(6 / 255, np.float32), "zero": zero}
    renamed: dict[str, str] = {}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        if node.op_type == "Conv" and node.input[0].endswith("_dq"):
            weight = node.input[1]
            value = stored[casts.get(weight, weight)].astype(np.float32)
            scale = np.maximum(np.abs(value).max(axis=(1, 2, 3)), 1e-6) / 63  # 7 bits: the sums of some CPUs saturate
            added[f"{weight}_s"] = scale.astype(np.float32)
            added[f"{weight}_q"] = np.rint(value / scale[:, None, None, None]).astype(np.int8)
            pair = [f"{weight}_q", f"{weight}_s"]
            nodes.append(helper.make_node("DequantizeLinear", pair, [f"{weight}_dq"], axis=0))
            node.input[1] = f"{weight}_dq"
        nodes.append(node)
        if node.op_type == "Clip":
            (name,) = node.output
            nodes.append(helper.make_node("QuantizeLinear", [name, "step", "zero"], [f"{name}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "step", "zero"], [f"{name}_dq"]))
            renamed[name] = f"{name}_dq"
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in added.items())
    properties = {entry.key: entry.value for entry in model.metadata_props}
    spec = ModelSpec.from_json(properties[METADATA_KEY]).replace(precision="int8")
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    return _saved(model, nodes, path)


def _saved(model: ModelProto, nodes: list[NodeProto], path: Path) -> Path:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
