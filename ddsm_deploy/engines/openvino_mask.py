"""The end of a network on our kernels: upsampled logits and the choice of a class become one step.

As OpenVINO has it, the logits of all classes are written at the image's size and read again to find the greatest: a
tenth of the network's time, for numbers that nobody asked for.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ddsm_deploy.engines.openvino_import import ov
from ddsm_deploy.engines.openvino_op import ClassMap, Keeper

op = ov.opset13

_MOST_CLASSES = 256  # of a mask of bytes
_RESIZE = {
    "mode": ("linear_onnx", "linear"),
    "coordinate_transformation_mode": ("half_pixel",),
    "antialias": (False,),
    "pads_begin": ([0, 0, 0, 0], []),
    "pads_end": ([0, 0, 0, 0], []),
}


def join_mask(model: Any, keeper: Keeper, float_type: str) -> bool:
    """Puts one operator for ``Resize, ArgMax, Cast to uint8`` at the end of a model that gives a mask and nothing else.

    Args:
        model: as it was read; changed in place.
        keeper: see there.
        float_type: what the arithmetic outside runs at; logits of bf16 are taken as they are.

    Returns:
        Whether the model ends so, and its sizes are known.
    """
    if len(model.outputs) != 1:
        return False
    end = model.outputs[0].get_node().input_value(0).get_node()
    resize = _resize_before(end)
    if resize is None:
        return False
    logits = op.transpose(resize.input_value(0), op.constant(np.array([0, 2, 3, 1], np.int64)))
    if float_type == "bf16":
        logits = op.convert(logits, "bf16")
    _, _, rows, columns = resize.output(0).get_partial_shape()
    mask = ClassMap([logits], weakref.ref(keeper), (rows.get_length(), columns.get_length()))
    mask.set_friendly_name(end.get_friendly_name())
    mask.output(0).get_tensor().set_names(end.output(0).get_tensor().get_names())
    end.output(0).replace(mask.output(0))
    return True


def _resize_before(end: Any) -> Any:
    """The Interpolate behind whose result lies nothing but the choice of a class, or None where it is otherwise."""
    squeeze = _sole_source(end, "Convert")
    top = _sole_source(squeeze, "Squeeze")
    resize = _sole_source(top, "TopK")
    if resize is None or resize.get_type_name() != "Interpolate" or end.get_element_type() != ov.Type.u8:
        return None
    chosen, sampled = top.get_attributes(), resize.get_attributes()
    count = top.input_value(1).get_node()
    one = count.get_type_name() == "Constant" and count.data.size == 1 and int(count.data.reshape(-1)[0]) == 1
    if (chosen["axis"], chosen["mode"]) != (1, "max") or not one or squeeze.input_value(0).get_index() != 1:
        return None
    if any(sampled[name] not in allowed for name, allowed in _RESIZE.items()):
        return None
    before, after = resize.input_value(0).get_partial_shape(), resize.output(0).get_partial_shape()
    known = len(after) == 4 and all(axis.is_static for axis in (*list(before)[1:], *list(after)[1:]))
    return resize if known and before[1] == after[1] and after[1].get_length() <= _MOST_CLASSES else None


def _sole_source(node: Any, kind: str) -> Any:
    """What feeds a node of a kind; None where it is of another kind, or something else reads it too."""
    if node is None or node.get_type_name() != kind:
        return None
    readers = [target for output in node.outputs() for target in output.get_target_inputs()]
    return node.input_value(0).get_node() if len(readers) == 1 else None
