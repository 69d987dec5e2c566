"""A deployed model of two convolutions, the second of which INT8 must harm and the first of which it can't.

Classes are the strongest of red, green and blue, as in `colour_graph`. The first convolution copies the three channels
and adds a fourth that is a thousand times their sum; the second reads the three and gives the fourth no weight. One
scale for all four channels of the second's input leaves nothing of the three, while its output without INT8 is exact.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from colour_graph import colour_spec
from onnx import TensorProto, helper, numpy_helper

from ddsm_deploy.spec import METADATA_KEY

SAFE, HARMED = "safe", "harmed"


def outlier_graph(size: tuple[int, int]) -> onnx.ModelProto:
    """The model as a protobuf message; input 1×H×W×3, BGR."""
    spread = np.vstack([np.eye(3), np.full((1, 3), 1000.0)]).astype(np.float32)
    pick = np.hstack([np.eye(3), np.zeros((3, 1))]).astype(np.float32)
    stored = {
        "to_rgb": np.array([2, 1, 0], np.int64),
        "network.safe.weight": spread.reshape(4, 3, 1, 1),
        "network.harmed.weight": pick.reshape(3, 4, 1, 1),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], name="planes", perm=[0, 3, 1, 2]),
        helper.make_node("Gather", ["planes", "to_rgb"], ["rgb"], name="rgb", axis=1),
        helper.make_node("Conv", ["rgb", "network.safe.weight"], ["four"], name="conv_safe"),
        helper.make_node("Conv", ["four", "network.harmed.weight"], ["three"], name="conv_harmed"),
        helper.make_node("ArgMax", ["three"], ["ids"], name="argmax", axis=1, keepdims=0),
        helper.make_node("Cast", ["ids"], ["mask"], name="mask", to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "outlier",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, [1, *size, 3])],
        [helper.make_tensor_value_info("mask", TensorProto.UINT8, [1, *size])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: colour_spec(size=size).to_json()})
    return model


def write_outlier_model(path: Path, *, size: tuple[int, int]) -> Path:
    """Writes the model; returns its path."""
    onnx.save(outlier_graph(size), path)
    return path
