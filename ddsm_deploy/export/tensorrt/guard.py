"""Graphs that TensorRT would misread, or that it refuses with a message nobody understands, are refused here first.

Each rule was tried on TensorRT-RTX 1.7.1's parser and builder, with a graph of a few nodes; the tests hold those. What
depends on a version stands in `known`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from ddsm_deploy.errors import BackendError
from ddsm_deploy.export.tensorrt.known import REFUSE, WARN, known_bad

_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_PRODUCTS = ("MatMul", "Gemm", "Einsum")
COMPUTED = ("Conv", "ConvTranspose", *_PRODUCTS)
"""Operators whose type decides how fast an engine is."""

_NVIDIA_WORDS = {TensorProto.FLOAT: "Float", TensorProto.FLOAT16: "Half", TensorProto.BFLOAT16: "BFloat16"}
_SIGNED = "quantize it with signed 8-bit integers and zero points of 0: ddsm quantize --target tensorrt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a graph is about to be built for.

    Attributes:
        target: ``tensorrt`` or ``tensorrt-rtx``.
        version: of the installed library.
        compute_capabilities: of the GPUs, as ``86``; empty where the builder takes the GPU that is there.
    """

    target: str
    version: str
    compute_capabilities: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}[self.target]
        return f"{name} {self.version}"


def check_graph(model: ModelProto, target: Target) -> tuple[str, ...]:
    """Refuses a graph that would be misread.

    Returns:
        What is doubtful about it all the same, a sentence each.

    Raises:
        BackendError: it would be misread or refused; the message names the node and says what to do.
    """
    graph = Graph(model)
    problems = list(problems_of(graph, target))
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise BackendError(f"this graph can't go to {target}: {problems[0]}{more}")
    return tuple(dict.fromkeys(_doubts(graph, target)))


def problems_of(graph: Graph, target: Target) -> Iterator[str]:
    """What would be misread, a sentence each that begins with the node's name."""
    yield from _unknown_sampling(graph, target)
    for node in graph.nodes:
        match node.op_type:
            case "GridSample":
                yield from _mixed_sampling(graph, node)
            case "QuantizeLinear" | "DequantizeLinear":
                yield from _zero_point(graph, node)
        yield from _small_integers(graph, node)
        if target.target == "tensorrt-rtx" and "75" in target.compute_capabilities:
            yield from _turing_product(graph, node)


class Graph:
    """A model's nodes, those of functions and subgraphs included, with what is known of their values."""

    def __init__(self, model: ModelProto) -> None:
        model = inliner.inline_local_functions(model) if model.functions else model
        # not strict: a type that can't be inferred leaves a rule without ground, and NVIDIA's parser has its own say
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
        self.opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
        self.nodes = list(_walk(inferred))
        self.stored = {tensor.name: tensor for tensor in inferred.initializer}
        for node in self.nodes:
            value = next((a.t for a in node.attribute if node.op_type == "Constant" and a.name == "value"), None)
            if value is not None:
                self.stored[node.output[0]] = value
        self.types = {name: tensor.data_type for name, tensor in self.stored.items()}
        for info in (*inferred.value_info, *inferred.input, *inferred.output):
            self.types[info.name] = info.type.tensor_type.elem_type
        self.inputs = {info.name for info in inferred.input}
        self.outputs = {info.name for info in inferred.output}

    def sampling_modes(self) -> list[str]:
        """``linear``, ``cubic`` or ``nearest`` for each GridSample node, as the graph means it."""
        return [_mode(node) for node in self.nodes if node.op_type == "GridSample"]

    def computed_types(self) -> dict[str, str]:
        """Convolution or matrix product -> the type in which it is written to be computed, NVIDIA's word."""
        makers = {name: node for node in self.nodes for name in node.output}
        types = {}
        for node in self.nodes:
            if node.op_type in COMPUTED and node.name:
                quantized = all(makers[n].op_type == "DequantizeLinear" for n in node.input[:2] if n in makers)
                fed = node.input[0] in makers and makers[node.input[0]].op_type == "DequantizeLinear"
                float_type = _NVIDIA_WORDS.get(self.types.get(node.input[0], 0), "unknown")
                types[node.name] = "Int8" if quantized and fed else float_type
        return types

    def type_name(self, value: str) -> str:
        """A value's element type, numpy's word."""
        kind = self.types.get(value, 0)
        return TensorProto.DataType.Name(kind).lower() if kind else "unknown"


def _walk(graph: onnx.GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _walk(inner)


def _called(node: NodeProto) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else f"the {node.op_type} that makes {node.output[0]!r}"


def _mode(node: NodeProto) -> str:
    text = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "mode"), b"linear").decode()
    return {"bilinear": "linear", "bicubic": "cubic"}.get(text, text)


def _unknown_sampling(graph: Graph, target: Target) -> Iterator[str]:
    for node in graph.nodes:
        if node.op_type != "GridSample":
            continue
        row = known_bad(
            target.target, target.version, op="GridSample", opset=graph.opset, mode=_mode(node), action=REFUSE
        )
        if row:
            yield (
                f"{_called(node)} is of opset {graph.opset}, which renamed the modes of GridSample: {row.effect} "
                f"({row.source}); export it at opset 19, as `ddsm export` does"
            )


def _mixed_sampling(graph: Graph, node: NodeProto) -> Iterator[str]:
    image, grid = (graph.types.get(name, 0) for name in node.input[:2])
    if image and grid and image != grid:
        yield (
            f"{_called(node)} takes a {graph.type_name(node.input[0])} map and a "
            f"{graph.type_name(node.input[1])} grid; both must be of one type: put a Cast before one of them"
        )


def _zero_point(graph: Graph, node: NodeProto) -> Iterator[str]:
    """Only int8 with a zero point of 0 is read as written; see the tests for what becomes of all else."""
    quantized = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
    kind = graph.types.get(quantized, 0)
    zero = node.input[2] if len(node.input) > 2 else ""
    if kind == TensorProto.INT32:
        yield f"{_called(node)} takes an int32 bias, which TensorRT refuses; leave biases in float: {_SIGNED}"
    elif kind == TensorProto.UINT8:
        how = "" if zero else " (that is what ONNX says of one without a zero point)"
        yield f"{_called(node)} is of uint8{how}, which TensorRT reads as int8 and so halves its range; {_SIGNED}"
    elif kind not in (0, TensorProto.INT8):
        yield f"{_called(node)} is of {graph.type_name(quantized)}; only int8 is read as written: {_SIGNED}"
    elif zero:
        stored = graph.stored.get(zero)
        if stored is None:
            yield f"{_called(node)} has a zero point that is computed ({zero!r}); {_SIGNED}"
        elif np.any(numpy_helper.to_array(stored)):
            yield f"{_called(node)} has a zero point other than 0; {_SIGNED}"


def _small_integers(graph: Graph, node: NodeProto) -> Iterator[str]:
    """uint8 lives at the graph's inputs and outputs alone, 16-bit integers nowhere, stored int8 only before its DQ."""
    if node.op_type in _QUANTIZERS:
        return
    for name in node.input:
        kind = graph.types.get(name, 0)
        if kind == TensorProto.UINT8 and name in graph.inputs and node.op_type not in ("Cast", "Shape"):
            yield f"{_called(node)} reads the uint8 input {name!r}; only a Cast may: put one first"
        elif kind == TensorProto.INT8 and name in graph.stored:
            yield f"{_called(node)} reads the stored int8 tensor {name!r}; only a DequantizeLinear may"
    for name in node.output:
        kind = graph.types.get(name, 0)
        if kind in (TensorProto.INT16, TensorProto.UINT16):
            yield f"{_called(node)} gives {graph.type_name(name)}, a type that TensorRT lacks; use int32"
        elif kind == TensorProto.UINT8 and not (name in graph.outputs and node.op_type == "Cast"):
            yield (
                f"{_called(node)} gives uint8 inside the graph; TensorRT has that at inputs and outputs only: "
                "compute in int32 or float, and let a Cast to uint8 be the last node"
            )


def _turing_product(graph: Graph, node: NodeProto) -> Iterator[str]:
    if node.op_type in _PRODUCTS and graph.types.get(node.input[0]) == TensorProto.FLOAT:
        yield (
            f"{_called(node)} multiplies float32 matrices, which TensorRT-RTX can't on compute capability 75 (Turing); "
            "build it with --precision fp16, or leave 75 out"
        )


def _doubts(graph: Graph, target: Target) -> Iterable[str]:
    for node in graph.nodes:
        row = known_bad(
            target.target, target.version, op=node.op_type, opset=graph.opset, mode=_any_mode(node), action=WARN
        )
        if row:
            yield f"{node.op_type}: {row.effect} ({row.source})"


def _any_mode(node: NodeProto) -> str:
    return _mode(node) if node.op_type == "GridSample" else ""
