"""Dynamic sampling inside OpenVINO: as an operator on our kernels, or written out in OpenVINO's own operators.

OpenVINO's reader of ONNX knows no model-local functions, so the body that a fused file carries is no help to it. Here
is what it reads the node as instead. Dimension letters: see `model/operator.py`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from ddsm_deploy import kernels
from ddsm_deploy.engines.openvino_import import ov
from ddsm_deploy.errors import BackendError, InputError
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

op = ov.opset13

_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # planar -> channels last, and back

PositionTables = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""A position embedding kept apart by axis: rows Y×K and columns X×K."""


class SamplingReader:
    """What OpenVINO reads the nodes of a fused file as; keeps the operators alive that this makes.

    OpenVINO calls a Python operator only while something in Python refers to it. An operator that is to see to that
    itself (``super().__init__(self)``, as the manual has it) is never freed, nor is the graph before it: 30 MB each
    time that the shipped model is opened (seen in 2026.4). So the engine keeps them, by keeping this.

    Args:
        sampling: ``fused`` or ``portable``.
        float_type: what the arithmetic outside runs at; tensors of bf16 are sampled as they are.
    """

    def __init__(self, sampling: str, float_type: str) -> None:
        self.sampling = sampling
        self.float_type = float_type
        self._kept: list[Any] = []
        self._open = True

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

    def keep(self, operator: Any) -> None:
        """Called by each operator as it is made: those of the model, and OpenVINO's copies of them."""
        if self._open:
            self._kept.append(operator)

    def compiled(self) -> None:
        """The model is compiled, and its graph, with a copy of all weights for each stage, is to go.

        The operators that are kept would hold all that is before them; so they are cut off from it. From now on no
        operator is kept: each new shape makes copies, which are needed for a moment only.
        """
        self._open = False
        for operator in self._kept:
            inputs = [operator.input(index) for index in range(operator.get_input_size())]
            stubs = [op.parameter(i.get_partial_shape(), i.get_element_type()).output(0) for i in inputs]
            operator.set_arguments(stubs)

    def _on_kernels(self, inputs: list[Any]) -> Any:
        # Channels last is how the plugin's convolutions hold their tensors, so the transpositions cost nothing, and it
        # is how the kernels read best. Where the plugin computes in bf16, the conversions cost nothing either.
        half = self.float_type == "bf16"
        query, key = (_position_apart(node) for node in inputs[:2])
        moved = [op.transpose(node, _integers(*_LAST)) for node in (query[0], key[0], *inputs[2:])]
        converted = [op.convert(node, "bf16") for node in moved] if half else moved
        result = SampleAttention(converted, weakref.ref(self), (query[1], key[1]))
        return op.transpose(op.convert(result, "f32") if half else result, _integers(*_FIRST)).output(0)


class DynamicSampleAttention:
    """Stands for an operator where OpenVINO wants a Python object to hold on to, and gives the nodes their names."""


# One for all, and never freed: OpenVINO lets go of it in threads that do not hold the GIL (seen in 2026.4), where
# freeing it would take the process along.
_STAND_IN = DynamicSampleAttention()


class SampleAttention(ov.Op):  # type: ignore[misc]
    """`dynamic_sample_attention` on tensors B×Y×X×C."""

    class_type_info = ov.DiscreteTypeInfo(SAMPLING_OP, SAMPLING_DOMAIN)

    def __init__(
        self,
        inputs: list[Any],
        reader: weakref.ref[SamplingReader],
        positions: tuple[PositionTables | None, PositionTables | None],
    ) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_STAND_IN))
        super().__init__(_STAND_IN, inputs)
        self._reader = reader
        self._tables = positions
        self._positions = (_position(positions[0]), _position(positions[1]))
        owner = reader()
        if owner is not None:
            owner.keep(self)

    def validate_and_infer_types(self) -> None:
        """The output is of value's type and shape."""
        self.set_output_type(0, self.get_input_element_type(2), self.get_input_partial_shape(2))

    def clone_with_new_inputs(self, inputs: list[Any]) -> SampleAttention:
        """A copy, as OpenVINO wants one for each model that it derives."""
        return SampleAttention(inputs, self._reader, self._tables)

    def visit_attributes(self, _: Any) -> bool:
        """It has none."""
        return True

    def has_evaluate(self) -> bool:
        """Yes: `evaluate` is how it runs."""
        return True

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs it; called inside an inference, by several threads at once where there are several inferences."""
        arrays = [tensor.data for tensor in inputs]
        query, key, value, offset = (array.shape for array in arrays)
        if key != query or not query[:3] == value[:3] == offset[:3] or offset[3] % 2:
            raise InputError(f"query {query}, key {key}, value {value} and offset {offset} do not belong together")
        result = outputs[0].data
        if result.shape != value:
            outputs[0].shape = value
            result = outputs[0].data
        batch, rows, columns, channels = query
        sizes = kernels.Sizes(batch, channels, value[3], offset[3] // 2, rows, columns)
        q, k, v, o = map(_view, arrays)
        kernels.forward(sizes, q, k, v, o, _view(result), _pool(), positions=self._positions)
        return True


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


def _position(tables: PositionTables | None) -> kernels.Position | None:
    return None if tables is None else kernels.Position(tables[0].ctypes.data, tables[1].ctypes.data)


def _view(array: Any) -> kernels.View:
    _, rows, columns, channels = array.shape
    # numpy knows no bfloat16, so the size of an element tells
    kind = kernels.F32 if array.itemsize == 4 else kernels.BF16
    return kernels.View(array.ctypes.data, rows * columns * channels, 1, channels, kind)


def _pool() -> kernels.Pool | None:
    library = _tbb()
    if isinstance(library, str):
        return None
    pool: kernels.Pool = library.ddsm_tbb_pool()
    return pool


def pool_problem() -> str:
    """Why the kernels get one thread of an inference alone; empty where they share all of them."""
    library = _tbb()
    return library if isinstance(library, str) else ""


@functools.cache
def _tbb() -> ctypes.PyDLL | str:
    """The pool over OpenVINO's threads, or why there is none."""
    try:
        path = kernels.pool_path()
        # by its name alone: the copy that OpenVINO has loaded, now open to the library that needs it
        ctypes.CDLL("libtbb.so.12", mode=os.RTLD_NOLOAD | os.RTLD_NOW | os.RTLD_GLOBAL)
        library = ctypes.PyDLL(str(path))  # it answers at once: the GIL need not be let go
    except BackendError as exc:
        return str(exc)
    except OSError as exc:
        return f"OpenVINO's threads can't be shared: {exc}"
    if library.ddsm_tbb_abi() != kernels.ABI or not library.ddsm_tbb_fits():
        return "OpenVINO's threads can't be shared: its TBB is older than what the kernels were built with"
    library.ddsm_tbb_pool.restype = kernels.Pool
    return library


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
