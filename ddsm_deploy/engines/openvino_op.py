"""Dynamic sampling, and the step to classes, as operators of OpenVINO's that run on our kernels.

Dimension letters: see `model/operator.py`.
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

PositionTables = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
"""A position embedding kept apart by axis: rows Y×K and columns X×K."""


class Keeper:
    """Keeps the operators of one model alive.

    OpenVINO calls a Python operator only while something in Python refers to it. An operator that is to see to that
    itself (``super().__init__(self)``, as the manual has it) is never freed, nor is the graph before it: 30 MB each
    time that `ddsm-lite0-large` is opened (seen in 2026.4). So the engine keeps them, by keeping this.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []
        self._open = True

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
            stubs = [ov.opset13.parameter(i.get_partial_shape(), i.get_element_type()).output(0) for i in inputs]
            operator.set_arguments(stubs)


class DynamicSampleAttention:
    """Stands for an operator where OpenVINO wants a Python object to hold on to, and gives the nodes their names."""


# One for all, and never freed: OpenVINO lets go of it in threads that do not hold the GIL (seen in 2026.4), where
# freeing it would take the process along.
_STAND_IN = DynamicSampleAttention()


class _OnKernels(ov.Op):  # type: ignore[misc]
    """What the operators have in common. Their tensors are B×Y×X×C.

    Args:
        inputs: nodes.
        keeper: what keeps the operator and OpenVINO's copies of it.
        settings: what else it needs, the same for every copy.
    """

    def __init__(self, inputs: list[Any], keeper: weakref.ref[Keeper], *settings: Any) -> None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(_STAND_IN))
        self._keeper, self._settings = keeper, settings
        super().__init__(_STAND_IN, inputs)
        owner = keeper()
        if owner is not None:
            owner.keep(self)

    def clone_with_new_inputs(self, inputs: list[Any]) -> Any:
        """A copy, as OpenVINO wants one for each model that it derives."""
        return type(self)(inputs, self._keeper, *self._settings)

    def visit_attributes(self, _: Any) -> bool:
        """It has none."""
        return True

    def has_evaluate(self) -> bool:
        """Yes: `evaluate` is how it runs."""
        return True


class _Sampling(_OnKernels):
    """What those that sample have in common.

    Args:
        inputs: nodes.
        keeper: see `_OnKernels`.
        positions: added to query and key; None where there is none to add.
        sizes: of the call; None where they are known at inference alone.
    """

    def __init__(
        self,
        inputs: list[Any],
        keeper: weakref.ref[Keeper],
        positions: tuple[PositionTables | None, PositionTables | None],
        sizes: kernels.Sizes | None = None,
    ) -> None:
        self._sizes = sizes
        self._positions = (_position(positions[0]), _position(positions[1]))
        super().__init__(inputs, keeper, positions, sizes)  # the tables, to whose memory the positions point


class SampleAttention(_Sampling):
    """`dynamic_sample_attention` of query, key, value and offset."""

    class_type_info = ov.DiscreteTypeInfo(SAMPLING_OP, SAMPLING_DOMAIN)

    def validate_and_infer_types(self) -> None:
        """The output is of value's type and shape."""
        self.set_output_type(0, self.get_input_element_type(2), self.get_input_partial_shape(2))

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs it; called inside an inference, by several threads at once where there are several inferences."""
        arrays = [tensor.data for tensor in inputs]
        query, key, value, offset = shapes = [array.shape for array in arrays]
        sizes = sizes_of(*shapes)
        if sizes is None:
            raise InputError(f"query {query}, key {key}, value {value} and offset {offset} do not belong together")
        result = outputs[0].data
        if result.shape != value:
            outputs[0].shape = value
            result = outputs[0].data
        q, k, v, o = map(_view, arrays)
        kernels.forward(sizes, q, k, v, o, _view(result), _pool(), positions=self._positions)
        return True


class PackMaps(_Sampling):
    """The first half, of key and value: both as one map, in a tensor of as many bytes as the kernels want."""

    class_type_info = ov.DiscreteTypeInfo("PackMaps", SAMPLING_DOMAIN)
    _sizes: kernels.Sizes

    def validate_and_infer_types(self) -> None:
        """The output's form is the kernels' own."""
        kind = kernels.F32 if self.get_input_element_type(0) == ov.Type.f32 else kernels.BF16
        self.set_output_type(0, ov.Type.u8, ov.PartialShape([kernels.packed_bytes(self._sizes, kind)]))

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs it, as `SampleAttention.evaluate`."""
        key, value = (_view(tensor.data) for tensor in inputs)
        packed = _packed(outputs[0].data, key.type)
        kernels.pack(self._sizes, key, value, packed, _pool(), position=self._positions[1])
        return True


class AttendPacked(_Sampling):
    """The second half, of query, packed key and value, and offset."""

    class_type_info = ov.DiscreteTypeInfo("AttendPacked", SAMPLING_DOMAIN)
    _sizes: kernels.Sizes

    def validate_and_infer_types(self) -> None:
        """The output is as long and as wide as query, and of its type."""
        sizes = self._sizes
        shape = ov.PartialShape([sizes.batch, sizes.rows, sizes.columns, sizes.v])
        self.set_output_type(0, self.get_input_element_type(0), shape)

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs it, as `SampleAttention.evaluate`."""
        query, packed, offset = (tensor.data for tensor in inputs)
        view, out = _view(query), _view(outputs[0].data)
        kernels.attend(
            self._sizes, view, _packed(packed, view.type), _view(offset), out, _pool(), position=self._positions[0]
        )
        return True


class ClassMap(_OnKernels):
    """Logits B×Y×X×C -> the class of each pixel of a map of another size, B×Y'×X' uint8; its setting is (Y', X')."""

    class_type_info = ov.DiscreteTypeInfo("ClassMap", SAMPLING_DOMAIN)

    def __init__(self, inputs: list[Any], keeper: weakref.ref[Keeper], size: tuple[int, int]) -> None:
        self._size = size
        super().__init__(inputs, keeper, size)

    def validate_and_infer_types(self) -> None:
        """A mask of the batch of the logits."""
        batch = self.get_input_partial_shape(0)[0]
        self.set_output_type(0, ov.Type.u8, ov.PartialShape([batch, *self._size]))

    def evaluate(self, outputs: list[Any], inputs: list[Any]) -> bool:
        """Runs it, as `SampleAttention.evaluate`."""
        logits = inputs[0].data
        batch, rows, columns, classes = logits.shape
        if outputs[0].shape[0] != batch:
            outputs[0].shape = (batch, *self._size)
        sizes = kernels.MapSizes(batch, classes, rows, columns, *self._size)
        kernels.class_map(sizes, _view(logits), outputs[0].data.ctypes.data, _pool())
        return True


def sizes_of(*shapes: tuple[int, ...]) -> kernels.Sizes | None:
    """Of a call, from its shapes B×Y×X×C; None where they do not belong together."""
    query, key, value, offset = shapes
    if key != query or not query[:3] == value[:3] == offset[:3] or offset[3] % 2:
        return None
    batch, rows, columns, channels = query
    return kernels.Sizes(batch, channels, value[3], offset[3] // 2, rows, columns)


def _packed(array: Any, kind: int) -> kernels.Packed:
    return kernels.Packed(array.ctypes.data, array.size, kind)


def _position(tables: PositionTables | None) -> kernels.Position | None:
    return None if tables is None else kernels.Position(tables[0].ctypes.data, tables[1].ctypes.data)


def _view(array: Any) -> kernels.View:
    _, rows, columns, channels = array.shape
    # numpy knows no bfloat16, so the size of an element tells; float16 looks the same, and the engine keeps it away
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
