"""A deployed model whose right answer is known without any network: each pixel's class is its strongest colour.

Written with `onnx.helper` alone, so that tests of the engines' and the Segmenter's plumbing need neither torch nor an
export, and can state every expected pixel.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddsm_deploy.spec import METADATA_KEY, ModelSpec

CLASSES = ("red", "green", "blue")
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def colour_spec(*, size: tuple[int, int] = (8, 12), channel_order: str = "bgr") -> ModelSpec:
    """The spec of such a model; its mean is a strong blue, so that letterbox bars show up as ``blue``."""
    return ModelSpec(
        name="colours",
        classes=CLASSES,
        palette=PALETTE,
        height=size[0],
        width=size[1],
        mean=(10.0, 20.0, 250.0),
        channel_order=channel_order,
    )


def colour_graph(spec: ModelSpec, *, dynamic: bool = False, confidence: bool = False) -> onnx.ModelProto:
    """The model as a protobuf message.

    Args:
        spec: gives the size and the channel order, and is stored in the metadata.
        dynamic: leave batch, height and width open.
        confidence: add an output ``confidence``, the strongest channel's value.
    """
    size = ["batch", "height", "width"] if dynamic else [1, spec.height, spec.width]
    to_rgb = np.array([0, 1, 2] if spec.channel_order == "rgb" else [2, 1, 0], np.int64)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["pixels", "to_rgb"], ["rgb"], axis=3),
        helper.make_node("ArgMax", ["rgb"], ["ids"], axis=3, keepdims=0),
        helper.make_node("Cast", ["ids"], ["mask"], to=TensorProto.UINT8),
    ]
    outputs = [helper.make_tensor_value_info("mask", TensorProto.UINT8, size)]
    if confidence:
        nodes.append(helper.make_node("ReduceMax", ["rgb", "last"], ["strongest"], keepdims=0))
        nodes.append(helper.make_node("Cast", ["strongest"], ["confidence"], to=TensorProto.UINT8))
        outputs.append(helper.make_tensor_value_info("confidence", TensorProto.UINT8, size))
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [*size, 3])],
        outputs,
        [numpy_helper.from_array(to_rgb, "to_rgb"), numpy_helper.from_array(np.array([3], np.int64), "last")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    return model


def write_colour_model(
    path: Path,
    *,
    size: tuple[int, int] = (8, 12),
    channel_order: str = "bgr",
    dynamic: bool = False,
    confidence: bool = False,
) -> Path:
    """Writes the model; returns its path."""
    spec = colour_spec(size=size, channel_order=channel_order)
    onnx.save(colour_graph(spec, dynamic=dynamic, confidence=confidence), path)
    return path
