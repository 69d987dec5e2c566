"""A float32 ONNX graph rewritten in float16, with float32 islands where the arithmetic needs them. Uses onnx alone.

The dtypes lie in the graph, so every runtime that takes strongly typed networks (TensorRT 10 and 11, TensorRT-RTX)
reads its precision from the file, and one file serves them all. On a graph with Q/DQ pairs the result is INT8
convolutions with the rest in float16.

Islands, which stay float32:

- what decides: ArgMax, TopK and Softmax, and the upsampling right before them. Logits rounded to float16 after the
  upsampling would tie, and a tie is decided by the class's number;
- normalisations over an axis (LayerNormalization): they sum squares;
- the coordinates of dynamic sampling, from the convolution that predicts offsets to GridSample's grid, or to the
  indices and weights of the form without GridSample: a float16 holds pixel positions above 1024 only to a pixel.
  GridSample's two inputs must be of one type, so it is an island too unless ``grid="fp16"``;
- fused sampling: its body is written in float32, and so every kernel that stands for it computes;
- whatever computes shapes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.export.onnxgraph import drop_unused, plain_graph, value_types
from ddsm_deploy.export.sampling_function import OFFSET, is_sampling
from ddsm_deploy.onnxfile import SAMPLING_OP

GRIDS = ("fp32", "fp16")

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_LARGEST = float(np.finfo(np.float16).max)

_DECIDERS = {"ArgMax", "TopK", "Softmax", "LogSoftmax", "Hardmax"}
_NORMS = {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization"}
_SHAPE_INPUTS = {  # op -> inputs that are shapes, indices or scales: what feeds them is never half
    "Reshape": (1,),
    "Expand": (1,),
    "Tile": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "Gather": (1,),
    "GatherND": (1,),
    "GatherElements": (1,),
}
_LEARNED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "GridSample", SAMPLING_OP, "Softmax", "DequantizeLinear"}
"""Where the walk back along coordinates ends: behind these lies the network, not arithmetic on positions."""


def to_fp16(model: ModelProto, *, grid: str = "fp32") -> ModelProto:
    """Rewrites a float32 graph as strongly typed float16; inputs and outputs keep their types.

    Args:
        model: float32, with or without Q/DQ pairs (opset 19 or later then); left as it is.
        grid: type in which GridSample runs, ``fp32`` or ``fp16``; its coordinates are computed in float32 either way.

    Raises:
        ConfigError: no such grid type, or sampling is fused, which has none.
        ArtifactError: the graph has control flow, or is in float16 or bfloat16 already.
    """
    if grid not in GRIDS:
        raise ConfigError(f"grid is {grid!r}; expected {' or '.join(GRIDS)}")
    model = plain_graph(model)
    graph = model.graph
    if grid != "fp32" and any(map(is_sampling, graph.node)):
        raise ConfigError(
            "fused sampling computes in float32; leave the grid at fp32, or export with sampling portable"
        )
    types = value_types(model)
    if any(kind in (_HALF, TensorProto.BFLOAT16) for kind in types.values()):
        raise ArtifactError("the graph holds float16 already; make the float16 form from the float32 one")
    island = _islands(graph.node, types, grid=grid)
    _Rewriter(model, types, island).run()
    return model


def _islands(nodes: Iterable[NodeProto], types: dict[str, int], *, grid: str) -> set[int]:
    """Indices of the nodes that stay float32."""
    nodes = list(nodes)
    maker = {name: index for index, node in enumerate(nodes) for name in node.output}
    island = {i for i, node in enumerate(nodes) if node.op_type in _DECIDERS | _NORMS}
    for index in sorted(island):
        before = maker.get(nodes[index].input[0])
        if before is not None and nodes[before].op_type == "Resize":
            island.add(before)
    coordinates = _coordinates(nodes, types, maker)
    island |= {i for i, node in enumerate(nodes) if is_sampling(node)}
    if grid == "fp32":
        island |= {i for i, node in enumerate(nodes) if node.op_type == "GridSample"}
    return island | coordinates


def _coordinates(nodes: list[NodeProto], types: dict[str, int], maker: dict[str, int]) -> set[int]:
    """Nodes that compute positions, shapes or indices in floats: back from where those are used, then forward again."""
    found: set[int] = set()
    pending: list[str] = []
    for node in nodes:
        if node.op_type == "GridSample":
            pending.append(node.input[1])
        elif is_sampling(node):
            pending.append(node.input[OFFSET])
        pending.extend(node.input[i] for i in _SHAPE_INPUTS.get(node.op_type, ()) if i < len(node.input))
    while pending:
        index = maker.get(pending.pop())
        if index is None or index in found or nodes[index].op_type in _LEARNED:
            continue
        found.add(index)
        pending.extend(nodes[index].input)
    # a position that was rounded down gives an index; what remains of it weighs the neighbours, and is as delicate
    floats = {name for i in found for name in nodes[i].output if types.get(name) == _FLOAT}
    stored = {name for name in types if name not in maker}
    for index, node in enumerate(nodes):
        inputs = [name for name in node.input if name and types.get(name) == _FLOAT]
        if index in found or node.op_type in _LEARNED or not floats.intersection(inputs):
            continue
        if all(name in floats or name in stored for name in inputs):
            found.add(index)
            floats.update(node.output)
    return found


class _Rewriter:
    """Gives every float tensor its type, with a Cast wherever an island begins or ends."""

    def __init__(self, model: ModelProto, types: dict[str, int], island: set[int]) -> None:
        self.graph = model.graph
        self.types = types
        self.island = island
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {info.name for info in model.graph.output}
        self.now = {info.name: _FLOAT for info in model.graph.input if types[info.name] == _FLOAT}
        self.made: dict[tuple[str, int], str] = {}  # (value, type) -> its cast
        self.nodes: list[NodeProto] = []

    def run(self) -> None:
        for index, node in enumerate(list(self.graph.node)):
            kind = _FLOAT if index in self.island else _HALF
            always = _SHAPE_INPUTS.get(node.op_type, ()) if node.op_type in ("Resize", "Range") else ()
            for at, name in enumerate(node.input):
                if self.types.get(name) == _FLOAT:
                    node.input[at] = self.typed(name, _FLOAT if at in always else kind)
            if node.op_type == "Cast" and self.types[node.output[0]] == _FLOAT:
                next(a for a in node.attribute if a.name == "to").i = kind
            if node.op_type in ("ConstantOfShape", "EyeLike", "RandomNormal") and kind == _HALF:
                kind = _FLOAT  # their type is an attribute; what reads them casts
            self.nodes.append(node)
            for name in node.output:
                if self.types.get(name) == _FLOAT:
                    self.now[name] = kind
        self._finish_outputs()
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        drop_unused(self.graph)

    def typed(self, name: str, kind: int) -> str:
        """The name under which a float value can be had in that type."""
        if (name in self.stored and kind == _FLOAT) or self.now.get(name) == kind:
            return name
        if (name, kind) not in self.made:
            other = f"{name}.{'fp16' if kind == _HALF else 'fp32'}"
            if name in self.stored:
                self.graph.initializer.append(_half(self.stored[name], other))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [other], name=f"{other}.cast", to=kind))
            self.made[name, kind] = other
        return self.made[name, kind]

    def _finish_outputs(self) -> None:
        """Float outputs of the graph keep name and type: the tensor behind each is renamed, and cast at the end."""
        renamed = {}
        for name in sorted(self.outputs):
            if self.now.get(name) == _HALF:
                renamed[name] = f"{name}.half"
        for node in self.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]
        for name, half in renamed.items():
            self.nodes.append(helper.make_node("Cast", [half], [name], name=f"{name}.cast", to=_FLOAT))


def _half(tensor: TensorProto, name: str) -> TensorProto:
    array = numpy_helper.to_array(tensor).astype(np.float32)
    finite = np.where(np.isfinite(array), array.clip(-_LARGEST, _LARGEST), array)
    return numpy_helper.from_array(finite.astype(np.float16), name)


def float_types(model: ModelProto) -> collections.Counter[str]:
    """How many nodes of each kind of arithmetic give which float type, as ``Conv float16`` -> count."""
    types = value_types(model)
    names = {_FLOAT: "float32", _HALF: "float16", TensorProto.BFLOAT16: "bfloat16"}
    kinds = ((node.op_type, types.get(node.output[0])) for node in model.graph.node)
    return collections.Counter(f"{op} {names[kind]}" for op, kind in kinds if kind in names)
