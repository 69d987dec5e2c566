"""ONNX graphs as this package's passes want them: plain, typed, and with any tensor as an output. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx.checker
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.files import writing
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP, read_spec
from ddsm_deploy.onnxweights import read_whole
from ddsm_deploy.spec import METADATA_KEY, ModelSpec

Graph = ModelProto
"""For modules that pass a model on and need nothing of onnx."""


def load_graph(path: str | Path) -> ModelProto:
    """Reads a deployed ONNX file, which its outline must show to be sound (see `onnxfile.read_spec`).

    Raises:
        ArtifactError: damaged, foreign, or reaching outside its folder.
    """
    read_spec(path)
    try:
        return onnx.load_from_string(read_whole(path))
    except (DecodeError, OSError, ValueError) as exc:
        raise ArtifactError(f"{path}: can't be read as ONNX ({exc})") from exc


def save_graph(model: ModelProto, path: str | Path, spec: ModelSpec) -> None:
    """Writes a checked model with its record; equal models give equal bytes.

    Raises:
        ArtifactError: the graph is not valid ONNX: a bug of the pass that made it, or a graph that it does not know.
        InputError: the file can't be written.
    """
    set_metadata(model, {METADATA_KEY: spec.to_json()})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as exc:
        raise ArtifactError(f"{path}: the rewritten graph is not valid ({str(exc).splitlines()[0]})") from exc
    with writing(Path(path)):
        Path(path).write_bytes(model.SerializeToString(deterministic=True))


def set_metadata(model: ModelProto, entries: Mapping[str, str]) -> None:
    """Replaces the model's metadata by `entries`, sorted by key."""
    helper.set_model_props(model, dict(sorted(entries.items())))


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy that gives the named tensors as outputs too."""
    copy = ModelProto()
    copy.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {info.name: info for info in (*inferred.value_info, *inferred.input)}
    present = {info.name for info in copy.graph.output}
    copy.graph.output.extend(known[name] for name in names if name not in present)
    return copy


def value_bytes(model: ModelProto, names: Iterable[str]) -> dict[str, int | None]:
    """Bytes that float tensors take at run time; None where a size is open."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {info.name: info.type.tensor_type.shape for info in (*inferred.value_info, *inferred.input)}
    sizes: dict[str, int | None] = {}
    for name in names:
        dims = shapes[name].dim if name in shapes else []
        known = bool(dims) and all(dim.HasField("dim_value") for dim in dims)
        sizes[name] = 4 * math.prod(dim.dim_value for dim in dims) if known else None
    return sizes


def plain_graph(model: ModelProto) -> ModelProto:
    """A copy with functions inlined, Constant nodes and casts of stored tensors folded, and no control flow.

    So each tensor that is stored is an initializer of the type that its reader sees. Fused sampling stays as it is: one
    node with its body (see `sampling_function`).

    Raises:
        ArtifactError: the graph has control flow.
    """
    copy = ModelProto()
    copy.CopyFrom(_without_functions(model))
    graph = copy.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    kept: list[NodeProto] = []
    for node in graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ArtifactError(f"the graph has control flow ({node.op_type} {node.name!r}), which can't be rewritten")
        array = _folded(node, stored)
        if array is None:
            kept.append(node)
        else:
            tensor = numpy_helper.from_array(array, node.output[0])
            stored[tensor.name] = tensor
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)
    drop_unused(graph)
    return copy


def drop_unused(graph: onnx.GraphProto) -> None:
    """Removes initializers that nothing reads."""
    used = {name for node in graph.node for name in node.input} | {info.name for info in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def value_types(model: ModelProto) -> dict[str, int]:
    """Element type of every value in the main graph, by name."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for info in (*inferred.value_info, *inferred.input, *inferred.output):
        types[info.name] = info.type.tensor_type.elem_type
    return types


def _without_functions(model: ModelProto) -> ModelProto:
    fused = (SAMPLING_DOMAIN, SAMPLING_OP)
    if all((function.domain, function.name) == fused for function in model.functions):
        return model
    return inliner.inline_selected_functions(model, [fused], exclude=True)


def _folded(node: NodeProto, stored: dict[str, TensorProto]) -> np.ndarray | None:
    if node.op_type == "Constant":
        value = next((a for a in node.attribute if a.name == "value"), None)
        if value is not None:
            return numpy_helper.to_array(value.t)
        (only,) = node.attribute
        kind = np.int64 if only.name.startswith("value_int") else np.float32
        return np.array(helper.get_attribute_value(only), dtype=kind)
    if node.op_type == "Cast" and node.input[0] in stored:
        to = next(a.i for a in node.attribute if a.name == "to")
        return numpy_helper.to_array(stored[node.input[0]]).astype(helper.tensor_dtype_to_np_dtype(to))
    return None
