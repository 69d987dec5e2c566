"""Graphs of a few nodes, each with one thing that TensorRT misreads or refuses, and their harmless counterparts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

F32, F16, U8, I8, I16, I32 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.UINT8,
    TensorProto.INT8,
    TensorProto.INT16,
    TensorProto.INT32,
)
SIGNED, SIGNED_EACH = np.array(0, np.int8), np.zeros(4, np.int8)
Value = tuple[str, int, tuple[int, ...]]


def model(
    nodes: list[NodeProto],
    inputs: list[Value],
    outputs: list[Value],
    stored: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 19,
) -> ModelProto:
    """A checked model of one graph."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (stored or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.checker.check_model(made)
    return made


def save(made: ModelProto, path: Path) -> Path:
    """Writes it and returns the path."""
    onnx.save(made, path)
    return path


def sampling(*, mode: str | None = "bilinear", opset: int = 19, image: int = F32, grid: int = F32) -> ModelProto:
    """One GridSample."""
    attributes = {} if mode is None else {"mode": mode}
    node = helper.make_node("GridSample", ["x", "grid"], ["y"], name="sample", **attributes)
    return model(
        [node], [("x", image, (1, 2, 8, 8)), ("grid", grid, (1, 4, 4, 2))], [("y", image, (1, 2, 4, 4))], opset=opset
    )


def quantized(
    *,
    zero: np.ndarray | None = SIGNED,
    weight_zero: np.ndarray = SIGNED_EACH,
    bias: str = "none",
) -> ModelProto:
    """A quantized convolution; `zero` is its activation's zero point (None leaves it out)."""
    rng = np.random.default_rng(0)
    stored = {
        "scale": np.array(0.1, np.float32),
        "weight": rng.integers(0, 100, (4, 4, 3, 3)).astype(weight_zero.dtype),
        "weight.scale": np.full(4, 0.01, np.float32),
        "weight.zero": weight_zero,
    }
    pair = ["scale"]
    if zero is not None:
        stored["zero"] = zero
        pair.append("zero")
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["x.q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["x.q", *pair], ["x.dq"], name="dequantize"),
        helper.make_node(
            "DequantizeLinear", ["weight", "weight.scale", "weight.zero"], ["weight.dq"], name="weight.dq", axis=0
        ),
    ]
    inputs = ["x.dq", "weight.dq"]
    if bias == "int32":
        stored |= {"bias": np.arange(4, dtype=np.int32), "bias.scale": np.full(4, 0.001, np.float32)}
        nodes.append(helper.make_node("DequantizeLinear", ["bias", "bias.scale"], ["bias.dq"], name="bias.dq", axis=0))
        inputs.append("bias.dq")
    nodes.append(helper.make_node("Conv", inputs, ["y"], name="conv"))
    return model(nodes, [("x", F32, (1, 4, 8, 8))], [("y", F32, (1, 4, 6, 6))], stored)


def uint8_inside() -> ModelProto:
    """Class ids as uint8, with a node behind the Cast that makes them."""
    nodes = [
        helper.make_node("ArgMax", ["x"], ["ids"], axis=1, keepdims=0, name="argmax"),
        helper.make_node("Cast", ["ids"], ["bytes"], to=U8, name="cast"),
        helper.make_node("Unsqueeze", ["bytes", "axes"], ["y"], name="unsqueeze"),
    ]
    return model(nodes, [("x", F32, (1, 4, 8, 8))], [("y", U8, (1, 1, 8, 8))], {"axes": np.array([1])})


def uint8_ends() -> ModelProto:
    """uint8 in by a Cast, uint8 out by a Cast: the deployed form."""
    nodes = [
        helper.make_node("Cast", ["x"], ["floats"], to=F32, name="in"),
        helper.make_node("ArgMax", ["floats"], ["ids"], axis=1, keepdims=0, name="argmax"),
        helper.make_node("Cast", ["ids"], ["y"], to=U8, name="out"),
    ]
    return model(nodes, [("x", U8, (1, 4, 8, 8))], [("y", U8, (1, 8, 8))])


def uint8_input_transposed() -> ModelProto:
    """A uint8 input that something other than a Cast reads."""
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2], name="transpose"),
        helper.make_node("Cast", ["t"], ["y"], to=F32, name="cast"),
    ]
    return model(nodes, [("x", U8, (1, 8, 8, 3))], [("y", F32, (1, 3, 8, 8))])


def int16_inside() -> ModelProto:
    """A detour over int16."""
    nodes = [
        helper.make_node("Cast", ["x"], ["short"], to=I16, name="down"),
        helper.make_node("Cast", ["short"], ["y"], to=F32, name="up"),
    ]
    return model(nodes, [("x", F32, (1, 8))], [("y", F32, (1, 8))])


def stored_int8() -> ModelProto:
    """An int8 constant that a Cast reads, not a DequantizeLinear."""
    nodes = [
        helper.make_node("Cast", ["k"], ["floats"], to=F32, name="cast"),
        helper.make_node("Add", ["x", "floats"], ["y"], name="add"),
    ]
    return model(nodes, [("x", F32, (1, 4, 8, 8))], [("y", F32, (1, 4, 8, 8))], {"k": np.ones((1, 4, 1, 1), np.int8)})


def product(kind: int = F32) -> ModelProto:
    """One MatMul."""
    stored = {"k": np.ones((8, 8), np.float32 if kind == F32 else np.float16)}
    node = helper.make_node("MatMul", ["x", "k"], ["y"], name="product")
    return model([node], [("x", kind, (1, 4, 8))], [("y", kind, (1, 4, 8))], stored)
