"""A fused graph as TensorRT's parser must see it to take the plugin for each of its sampling nodes, or to refuse it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.export.onnxgraph import drop_unused
from ddsm_deploy.export.sampling_function import OFFSET, is_sampling
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def plugin_graph(model: ModelProto) -> ModelProto:
    """A copy whose sampling nodes can't become anything but a plugin that is compiled ahead of time.

    Parsers of different versions choose differently between a plugin and the node's body, so the body is left out. And
    where a float16 graph casts to float32 before sampling and back behind it, as the body needs it, the casts go: the
    plugin reads and writes float16 and computes in float32. Offsets stay as they are.

    Args:
        model: an exported graph; its sampling nodes need their body, by which types and shapes are known.

    Raises:
        ConfigError: the graph has no sampling node.
    """
    if not sampling_nodes(model):
        raise ConfigError(
            f"a plugin can only take the place of {SAMPLING_DOMAIN}::{SAMPLING_OP}, and this model's sampling is "
            "written otherwise; export it with: ddsm export CHECKPOINT --sampling fused"
        )
    types = _known(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    outputs = {info.name for info in graph.output}
    nodes, infos = list(graph.node), []
    for node in filter(is_sampling, list(nodes)):
        node.attribute.append(helper.make_attribute("aot", 1))  # by this the parser asks for that kind of plugin
        info = ValueInfoProto()
        info.CopyFrom(types[node.output[0]])
        halves = _halves(node, nodes, graph, types)
        if halves:
            _take_half(node, halves, nodes, outputs)
            info.name, info.type.tensor_type.elem_type = node.output[0], _HALF
            types[info.name] = info
        infos.append(info)
    nodes = _without_unread_casts(nodes, outputs)
    functions = [f for f in model.functions if (f.domain, f.name) != (SAMPLING_DOMAIN, SAMPLING_OP)]
    del graph.node[:], graph.value_info[:], copy.functions[:]
    graph.node.extend(nodes)
    graph.value_info.extend(info for info in infos if info.name not in outputs)  # nothing else tells of them now
    copy.functions.extend(functions)
    drop_unused(graph)
    return copy


def sampling_nodes(model: ModelProto) -> int:
    """How many sampling nodes a graph has."""
    return sum(map(is_sampling, model.graph.node))


def _known(model: ModelProto) -> dict[str, ValueInfoProto]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {info.name: info for info in (*inferred.value_info, *inferred.input, *inferred.output)}


def _halves(node: NodeProto, nodes: list[NodeProto], graph: GraphProto, types: dict[str, ValueInfoProto]) -> list[str]:
    """Query, key and value of a node in float16, if that is what they are cast from; what is stored is rounded."""
    casts = {maker.output[0]: maker.input[0] for maker in nodes if maker.op_type == "Cast"}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    names = node.input[:OFFSET]
    from_half = [n in casts and types[casts[n]].type.tensor_type.elem_type == _HALF for n in names]
    if not any(from_half) or not all(half or n in stored for n, half in zip(names, from_half, strict=True)):
        return []
    return [casts[n] if half else _rounded(stored[n], graph) for n, half in zip(names, from_half, strict=True)]


def _rounded(tensor: TensorProto, graph: GraphProto) -> str:
    """The name of a stored tensor's float16 form."""
    name = f"{tensor.name}.half"
    if all(each.name != name for each in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), name))
    return name


def _take_half(node: NodeProto, halves: list[str], nodes: list[NodeProto], outputs: set[str]) -> None:
    """Lets a node read those, and who casts its result back read that as it is."""
    node.input[:OFFSET] = halves
    result = node.output[0]
    node.output[0] = half = f"{result}.half"
    same = {
        reader.output[0]
        for reader in nodes
        if reader.op_type == "Cast" and reader.input[0] == result and _cast_to(reader) == _HALF
    } - outputs
    for reader in nodes:
        reader.input[:] = [half if name in same else name for name in reader.input]
    # what else reads the result gets it as before; where nothing does, this cast goes again
    nodes.insert(nodes.index(node) + 1, helper.make_node("Cast", [half], [result], name=f"{result}.cast", to=_FLOAT))


def _without_unread_casts(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    kept: list[NodeProto] = []
    read = set(outputs)
    for node in reversed(nodes):
        if node.op_type != "Cast" or node.output[0] in read:
            kept.append(node)
            read.update(node.input)
    return kept[::-1]


def _cast_to(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
