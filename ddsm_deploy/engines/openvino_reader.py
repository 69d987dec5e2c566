"""What OpenVINO reads the node of a fused file as: operators on our kernels, or OpenVINO's own.

OpenVINO's reader of ONNX knows no model-local functions, so the body that a fused file carries is no help to it.
Dimension letters: see `model/operator.py`.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from ddsm_deploy import kernels
from ddsm_deploy.engines.openvino_import import ov
from ddsm_deploy.engines.openvino_op import (
    AttendPacked,
    Keeper,
    PackMaps,
    PositionTables,
    SampleAttention,
    sizes_of,
)
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

op = ov.opset13

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # planar -> channels last, and back

_LARGE = 1 << 24
"""Bytes from which key and value are packed into a tensor of OpenVINO's. The kernels' own scratch memory comes on top
of what OpenVINO has planned for; a tensor takes the place of others that are not needed at that time. Below, one call
to Python less is worth more: 0.1 ms or so."""


class SamplingReader(Keeper):
    """What OpenVINO reads the nodes of a fused file as; keeps the operators alive that this makes.

    Args:
        sampling: ``fused`` or ``portable``.
        float_type: what the arithmetic outside runs at; tensors of bf16 are sampled as they are.
    """

    def __init__(self, sampling: str, float_type: str) -> None:
        super().__init__()
        self.sampling = sampling
        self.float_type = float_type

    def extension(self) -> Any:
        """For `openvino.Core.add_extension`, before the model is read."""
        itself = weakref.ref(self)  # OpenVINO keeps extensions for good

        def read(node: Any) -> list[Any]:
            reader = itself()
            assert reader is not None  # it lives as long as the core is in use
            return reader.read([node.get_input(index) for index in range(4)])

        return ov.frontend.onnx.ConversionExtension(SAMPLING_OP, SAMPLING_DOMAIN, read)

    def read(self, inputs: list[Any]) -> list[Any]:
        """The outputs of one node, from query, key, value and offset."""
        if self.sampling == "portable":
            return [written_out(*inputs)]
        return [self._on_kernels(inputs)]

    def _on_kernels(self, inputs: list[Any]) -> Any:
        # Channels last is how the plugin's convolutions hold their tensors, so the transpositions cost nothing, and it
        # is how the kernels read best. Where the plugin computes in bf16, the conversions cost nothing either.
        half = self.float_type == "bf16"
        query, key = (_position_apart(node) for node in inputs[:2])
        moved = [op.transpose(node, _integers(*_LAST)) for node in (query[0], key[0], *inputs[2:])]
        converted = [op.convert(node, "bf16") for node in moved] if half else moved
        result = self._operator(converted, (query[1], key[1]))
        return op.transpose(op.convert(result, "f32") if half else result, _integers(*_FIRST)).output(0)

    def _operator(self, inputs: list[Any], positions: tuple[PositionTables | None, PositionTables | None]) -> Any:
        query, key, value, offset = inputs
        keeper: weakref.ref[Keeper] = weakref.ref(self)
        sizes = _sizes(inputs)
        kind = kernels.BF16 if self.float_type == "bf16" else kernels.F32
        if sizes is None or kernels.packed_bytes(sizes, kind) < _LARGE:
            return SampleAttention(inputs, keeper, positions)
        packed = PackMaps([key, value], keeper, positions, sizes)
        return AttendPacked([query, packed, offset], keeper, positions, sizes)


def _sizes(inputs: list[Any]) -> kernels.Sizes | None:
    """Of a call, from its inputs, B×Y×X×C; None where a shape is open, or wrong, which is said at inference."""
    if any(node.output(0).get_partial_shape().is_dynamic for node in inputs):
        return None
    return sizes_of(*(tuple(node.output(0).get_shape()) for node in inputs))


def _position_apart(output: Any) -> tuple[Any, PositionTables | None]:
    """A tensor less the position embedding that was added to it last, and that embedding; as it is where there is none.

    Left in the graph, rows and columns are folded into one map of C·Y·X constants, which OpenVINO then rearranges anew
    at each inference (seen in 2026.4): a tenth of the network's time.
    """
    if len(output.get_partial_shape()) != 4 or output.get_partial_shape().is_dynamic:
        return output, None
    _, k, y, x = output.get_shape()
    rest, columns = _constant_added(output, (k, 1, x))
    rest, rows = _constant_added(rest, (k, y, 1))
    if rows is None or columns is None:
        return output, None
    return rest, (np.ascontiguousarray(rows[:, :, 0].T), np.ascontiguousarray(columns[:, 0, :].T))


def _constant_added(output: Any, shape: tuple[int, ...]) -> tuple[Any, npt.NDArray[np.float32] | None]:
    """The other summand of an Add with a float32 constant of a shape, and the constant; else the tensor and None."""
    node = output.get_node()
    if node.get_type_name() != "Add":
        return output, None
    for index in (0, 1):
        summand = node.input_value(index)
        if summand.get_partial_shape().is_static and tuple(summand.get_shape()) == shape:
            constant = summand.get_node()
            if constant.get_type_name() == "Unsqueeze":  # the exporter folds no long constants
                constant = constant.input_value(0).get_node()
            if constant.get_type_name() == "Constant":
                return node.input_value(1 - index), np.array(constant.data, dtype=np.float32).reshape(shape)
    return output, None


def written_out(query: Any, key: Any, value: Any, offset: Any) -> Any:
    """The operator as a GridSample, planar, of any sizes; the same arithmetic as the body in the file."""
    shape = op.shape_of(offset)
    sizes = [op.gather(shape, _integers(axis), _integer(0)) for axis in (2, 3)]
    rows, columns = (op.convert(size, "f32") for size in sizes)
    pairs = op.reshape(offset, op.concat([_integers(0, -1, 2), *sizes], 0), True)
    pairs = op.gather(pairs, _integers(1, 0), _integer(2))  # (row, column) -> (x, y)
    pixel = op.reshape(op.divide(_number(2.0), op.concat([columns, rows], 0)), _integers(2, 1, 1), False)
    placed = op.multiply(pairs, pixel)
    placed = op.add(placed, op.concat([_nothing(_centres(rows, (1, -1, 1))), _centres(rows, (1, -1, 1))], 0))
    placed = op.add(placed, op.concat([_centres(columns, (1, 1, -1)), _nothing(_centres(columns, (1, 1, -1)))], 0))
    points = op.transpose(placed, _integers(0, 1, 3, 4, 2))
    grid = op.reshape(points, op.concat([_integers(0, -1), sizes[1], _integers(2)], 0), True)

    attributes = {"align_corners": False, "mode": "bilinear", "padding_mode": "zeros"}
    sampled = op.grid_sample(op.concat([key, value], 1), grid, attributes)
    sampled = op.reshape(sampled, op.concat([_integers(0, 0, -1), *sizes], 0), True)
    channels = [op.gather(op.shape_of(node), _integers(1), _integer(0)) for node in (query, value)]
    keys, values = op.variadic_split(sampled, _integer(1), op.concat(channels, 0)).outputs()
    scores = op.reduce_sum(op.multiply(keys, op.unsqueeze(query, _integer(2))), _integer(1), True)
    scale = op.power(op.convert(channels[0], "f32"), _number(-0.5))
    affinity = op.softmax(op.multiply(scores, scale), 2)
    return op.reduce_sum(op.multiply(values, affinity), _integer(2), False).output(0)


def _centres(size: Any, shape: tuple[int, ...]) -> Any:
    """Where GridSample has the centres of the pixels of an axis, -1..1."""
    steps = op.range(_number(0.0), op.squeeze(size, _integer(0)), _number(1.0), "f32")
    odd = op.add(op.multiply(steps, _number(2.0)), _number(1.0))
    return op.reshape(op.subtract(op.divide(odd, size), _number(1.0)), _integers(*shape), False)


def _nothing(node: Any) -> Any:
    return op.multiply(node, _number(0.0))


def _integers(*numbers: int) -> Any:
    return op.constant(np.array(numbers, dtype=np.int64))


def _integer(number: int) -> Any:
    return op.constant(np.array(number, dtype=np.int64))


def _number(number: float) -> Any:
    return op.constant(np.array(number, dtype=np.float32))
