"""Looking inside an ONNX file: which tensors could be watched, and the same graph with some of them as outputs.

Graph surgery alone; nothing runs here, and only the package onnx is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx.shape_inference
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from ddsm_deploy.errors import ArtifactError

Graph = ModelProto
"""An ONNX model in memory, for those who may not import onnx themselves."""

_FLOATS = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}
"""Types that every runtime hands out -> bytes."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor inside a graph that can be watched.

    Attributes:
        name: its name.
        node: name of the node that makes it.
        op_type: that node's operator.
        feeds: the tensors before it that can be watched too and from which that node computes it.
        shape: at the input size asked for; None where it can't be told.
        bytes: its size then, 0 where the shape can't be told.
    """

    name: str
    node: str
    op_type: str
    feeds: tuple[str, ...]
    shape: tuple[int, ...] | None
    bytes: int


def load(path: str | Path) -> ModelProto:
    """Reads an ONNX file, weights in files beside it included.

    Raises:
        ArtifactError: it can't be read.
    """
    try:
        return onnx.load(path)
    except (OSError, ValueError, google.protobuf.message.DecodeError) as exc:
        raise ArtifactError(f"{path}: can't be read as ONNX ({exc})") from exc


def watchable(model: ModelProto, shape: Sequence[int]) -> list[Tensor]:
    """The float tensors that depend on the input, in the graph's order.

    Tensors made of weights alone are left out: runtimes fold them when they load a file.

    Args:
        model: the graph; left as it is.
        shape: of its input, for instance 1×H×W×3, to tell the tensors' sizes.
    """
    types = _types(model, shape)
    fed = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    origin: dict[str, tuple[str, ...]] = dict.fromkeys(fed, ())  # tensor -> the nearest watchable ones before it
    found = []
    for index, node in enumerate(model.graph.node):
        before = [name for name in node.input if name in origin]
        if not before:
            continue
        feeds = tuple(dict.fromkeys(name for tensor in before for name in origin[tensor]))
        for name in filter(None, node.output):
            kind, dims = types.get(name, (0, None))
            origin[name] = feeds
            if kind not in _FLOATS:
                continue
            size = 0 if dims is None else int(np.prod(dims, dtype=np.int64)) * _FLOATS[kind]
            found.append(Tensor(name, node.name or f"#{index}", node.op_type, feeds, dims, size))
            origin[name] = (name,)
    return found


def expose(model: ModelProto, names: Iterable[str], shape: Sequence[int]) -> ModelProto:
    """A copy of the graph that gives these tensors as outputs too.

    Runtimes fuse nodes, and what is watched can't be fused away: the copy computes the same function, but not always by
    the same kernels as the original.

    Args:
        model: the graph; left as it is.
        names: tensors of `watchable`.
        shape: as there.
    """
    types = _types(model, shape)
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for name in names:
        if name not in present:
            kind, dims = types[name]
            # sizes are left open: the file may take other sizes than the one asked about
            open_dims = None if dims is None else [None] * len(dims)
            copy.graph.output.append(helper.make_tensor_value_info(name, kind, open_dims))
    return copy


def in_pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in pieces of at most `limit` bytes each; a larger tensor makes a piece of its own."""
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(t.bytes for t in piece) + tensor.bytes > limit:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def _types(model: ModelProto, shape: Sequence[int]) -> dict[str, tuple[int, tuple[int, ...] | None]]:
    """Tensor -> element type, and shape if it can be told, at one size of the input."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]  # of the exporter: symbolic
    dims = fixed.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        dim.dim_value = size
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    return {value.name: _type(value) for value in (*inferred.graph.value_info, *inferred.graph.output)}


def _type(value: ValueInfoProto) -> tuple[int, tuple[int, ...] | None]:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return tensor.elem_type, None
    return tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim)
