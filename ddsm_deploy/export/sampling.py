"""The sampling operator in ONNX: three forms of the one function in `model/operator.py`.

``portable`` is GridSample-16 (bilinear, zeros, align_corners=0). ``fused`` is one node of our own, whose body
(`sampling_function`) is the portable form. ``gather`` uses no GridSample at all, for runtimes that lack it or compute
it wrongly. All keep coordinates and softmax in float32, take batch and map sizes that are static or symbolic, and hold
no Einsum, Loop or If. Dimension letters: see `model/operator.py`.

The functions are entries for the ``custom_translation_table`` of `torch.onnx.export`: plain Python that calls opset 18,
at which the exporter works before it converts to the opset asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import defs
from onnxscript import ir, values
from onnxscript.onnx_opset import opset18 as op

import ddsm_deploy.model.operator  # noqa: F401  registers the operator with torch
from ddsm_deploy.export.sampling_function import PLUGIN, VERSION
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

Value = Any
"""A tensor of the graph being built; its `shape` holds integers where the size is static."""

Table = dict[Callable[..., Any], Callable[..., Any]]

SAMPLINGS = ("portable", "fused", "gather")


def translation_table(sampling: str) -> Table:
    """The ``custom_translation_table`` that writes the operator in the form `sampling`, one of `SAMPLINGS`."""
    form = {"portable": portable, "fused": fused, "gather": gather}[sampling]
    return {torch.ops.ddsm.dynamic_sample_attention.default: form}


def fused(query: Value, key: Value, value: Value, offset: Value) -> Value:
    """One node, without its body, which is attached to the finished model; shapes as in `dynamic_sample_attention`."""
    return _node()(query, key, value, offset, samples=offset.shape[1] // 2, **PLUGIN)


def _node() -> values.Op:
    kind, inputs = defs.OpSchema, ("query", "key", "value", "offset")
    schema = kind(
        SAMPLING_OP,
        SAMPLING_DOMAIN,
        VERSION,
        inputs=[kind.FormalParameter(name, "T") for name in inputs],
        outputs=[kind.FormalParameter("result", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            kind.Attribute("samples", kind.AttrType.INT, "N"),
            *(kind.Attribute(name, kind.AttrType.STRING, "") for name in PLUGIN),
        ],
    )
    return values.Op(values.Opset(SAMPLING_DOMAIN, VERSION), SAMPLING_OP, schema)


def portable(query: Value, key: Value, value: Value, offset: Value) -> Value:
    """One GridSample over key and value together; shapes as in `dynamic_sample_attention`."""
    k, v, n = query.shape[1], value.shape[1], offset.shape[1] // 2
    both = op.Concat(key, value, axis=1)
    sampled = op.GridSample(both, _grid(offset), mode="bilinear", padding_mode="zeros", align_corners=0)
    sampled = op.Reshape(sampled, _target([_batch(query), k + v, n], offset))
    keys = op.Slice(sampled, _ints(0), _ints(k), _ints(1))
    values = op.Slice(sampled, _ints(k), _ints(k + v), _ints(1))
    scores = op.ReduceSum(op.Mul(keys, op.Unsqueeze(query, _ints(2))), _ints(1), keepdims=1)
    affinity = op.Softmax(op.Mul(scores, _floats(k**-0.5)), axis=2)
    return op.ReduceSum(op.Mul(values, affinity), _ints(2), keepdims=0)


def gather(query: Value, key: Value, value: Value, offset: Value) -> Value:
    """Four gathers a map, channels last; shapes as in `dynamic_sample_attention`.

    Maps get a border of zeros one pixel wide, and positions are clamped to it. A position on the border or beyond reads
    zeros alone, so every index is valid and nothing has to be masked.
    """
    k, v, n = query.shape[1], value.shape[1], offset.shape[1] // 2
    batch = _batch(query)
    corners = _corners(offset)
    queries = op.Reshape(op.Transpose(query, perm=[0, 2, 3, 1]), _ints(batch, 1, -1, k))
    keys = op.Reshape(_gather_bilinear(key, corners), _ints(batch, n, -1, k))
    scores = op.ReduceSum(op.Mul(keys, queries), _ints(3), keepdims=1)
    affinity = op.Softmax(op.Mul(scores, _floats(k**-0.5)), axis=1)
    values = op.Reshape(_gather_bilinear(value, corners), _ints(batch, n, -1, v))
    result = op.ReduceSum(op.Mul(values, affinity), _ints(1), keepdims=0)  # B×(Y·X)×V
    return op.Reshape(op.Transpose(result, perm=[0, 2, 1]), _target([batch, v], offset))


def _grid(offset: Value) -> Value:
    """B×2N×Y×X in pixels -> B×(N·Y)×X×2 in GridSample's coordinates (x first, -1..1)."""
    n, y, x = offset.shape[1] // 2, _size(offset, 2), _size(offset, 3)
    swapped = np.arange(2 * n).reshape(n, 2)[:, ::-1].reshape(-1)
    pairs = op.Gather(offset, _ints(*swapped), axis=1)  # (row, column) -> (x, y), before the transposition: contiguous
    pairs = op.Reshape(pairs, _target([_batch(offset), n, 2], offset))
    pairs = op.Mul(pairs, _pair(_divide(2.0, x), _divide(2.0, y)))
    # align_corners=0 puts the centre of pixel i at (2i + 1) / size - 1
    centres = [op.Sub(_divide(op.Add(op.Mul(_steps(s), _floats(2.0)), _floats(1.0)), s), _floats(1.0)) for s in (x, y)]
    pairs = _add_by_axis(pairs, row=centres[1], column=centres[0], row_first=False)
    pairs = _near(pairs, 2.0)
    width = _ints(offset.shape[3]) if isinstance(offset.shape[3], int) else op.Shape(offset, start=3, end=4)
    target = op.Concat(_ints(_batch(offset), -1), width, _ints(2), axis=0)
    return op.Reshape(op.Transpose(pairs, perm=[0, 1, 3, 4, 2]), target)


def _corners(offset: Value) -> list[tuple[Value, Value]]:
    """The four (indices B×M×1 into a bordered map, weights B×M×1) of bilinear sampling at M = N·Y·X positions."""
    n, y, x = offset.shape[1] // 2, _size(offset, 2), _size(offset, 3)
    batch = _batch(offset)
    one = _floats(1.0)
    position = op.Reshape(offset, _target([batch, n, 2], offset))
    position = _add_by_axis(position, row=_steps(y), column=_steps(x), row_first=True)
    position = _near(position, 1e6)
    limit = _pair(y, x)
    position = op.Min(op.Max(position, _floats(-1.0)), limit)
    first = op.Min(op.Floor(position), op.Sub(limit, one))
    far_row, far_column = (
        op.Reshape(op.Gather(op.Sub(position, first), _ints(i), axis=2), _ints(batch, -1, 1)) for i in (0, 1)
    )
    near_row, near_column = op.Sub(one, far_row), op.Sub(one, far_column)

    stride = op.Add(x, _floats(2.0))
    index = op.ReduceSum(op.Mul(first, _pair(stride, one)), _ints(2), keepdims=0)
    # float32 counts exactly to 2^24 pixels, far above any map
    index = op.Cast(op.Add(index, op.Add(stride, one)), to=ir.DataType.INT64)
    index = op.Reshape(index, _ints(batch, -1, 1))
    below = op.Add(index, op.Cast(stride, to=ir.DataType.INT64))
    return [
        (index, op.Mul(near_row, near_column)),
        (op.Add(index, _ints(1)), op.Mul(near_row, far_column)),
        (below, op.Mul(far_row, near_column)),
        (op.Add(below, _ints(1)), op.Mul(far_row, far_column)),
    ]


def _gather_bilinear(image: Value, corners: list[tuple[Value, Value]]) -> Value:
    """Map B×C×Y×X sampled at `_corners`: B×M×C."""
    bordered = op.Pad(image, _ints(0, 0, 1, 1, 0, 0, 1, 1), _floats(0.0))
    pixels = op.Reshape(op.Transpose(bordered, perm=[0, 2, 3, 1]), _ints(_batch(image), -1, image.shape[1]))
    parts = [op.Mul(op.GatherND(pixels, index, batch_dims=1), weight) for index, weight in corners]
    return op.Add(op.Add(parts[0], parts[1]), op.Add(parts[2], parts[3]))


def _add_by_axis(pairs: Value, *, row: Value, column: Value, row_first: bool) -> Value:
    """B×N×2×Y×X plus Y numbers on its row entries and X numbers on its column entries: one constant an axis, no map."""
    row = op.Reshape(row, _ints(1, -1, 1))
    column = op.Reshape(column, _ints(1, 1, -1))
    no_row, no_column = op.Mul(row, _floats(0.0)), op.Mul(column, _floats(0.0))
    rows, columns = ([row, no_row], [no_column, column]) if row_first else ([no_row, row], [column, no_column])
    return op.Add(op.Add(pairs, op.Concat(*rows, axis=0)), op.Concat(*columns, axis=0))


def _near(position: Value, limit: float) -> Value:
    """Positions as they are, but `limit`, which must lie off the map, for those beyond it and for NaN.

    Runtimes differ on what GridSample makes of such: ONNX Runtime overflows and reads some pixel, OpenVINO gives NaN;
    and no index of a gather can be made of NaN. Clip would not do: ONNX Runtime's lets some NaN pass.
    """
    return op.Where(op.Less(op.Abs(position), _scalar(limit)), position, _scalar(limit))


def _size(tensor: Value, axis: int) -> Value:
    """Length of an axis as one float32: a constant where it is static, which the exporter then folds onwards."""
    size = tensor.shape[axis]
    if isinstance(size, int):
        return _floats(float(size))
    return op.Cast(op.Shape(tensor, start=axis, end=axis + 1), to=ir.DataType.FLOAT)


def _steps(size: Value) -> Value:
    """0, 1, 2 ... below `size`, float32."""
    return op.Range(_scalar(0.0), op.Squeeze(size), _scalar(1.0))


def _divide(number: Value | float, size: Value) -> Value:
    return op.Div(_floats(number) if isinstance(number, float) else number, size)


def _pair(first: Value, second: Value) -> Value:
    """Two numbers of shape [1] as 2×1×1, to meet the axis of length 2 in B×N×2×Y×X."""
    return op.Reshape(op.Concat(first, second, axis=0), _ints(2, 1, 1))


def _batch(tensor: Value) -> int:
    """The batch size in a Reshape's target: 0, which copies it, where it is symbolic."""
    size = tensor.shape[0]
    return size if isinstance(size, int) else 0


def _target(head: list[int], like: Value) -> Value:
    """A Reshape's target: `head`, then rows and columns of `like`."""
    y, x = like.shape[2], like.shape[3]
    if isinstance(y, int) and isinstance(x, int):
        return _ints(*head, y, x)
    return op.Concat(_ints(*head), op.Shape(like, start=2, end=4), axis=0)


def _ints(*numbers: int) -> Value:
    return _constant(np.array(numbers, dtype=np.int64))


def _floats(*numbers: float) -> Value:
    return _constant(np.array(numbers, dtype=np.float32))


def _scalar(number: float) -> Value:
    return _constant(np.array(number, dtype=np.float32))


def _constant(array: npt.NDArray[Any]) -> Value:
    return op.Constant(value=ir.tensor(array))
