"""The colour model with paint added to the pixels before the strongest colour is taken: weights that decide masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from colour_graph import CLASSES, colour_graph, colour_spec
from onnx import helper, numpy_helper

PAINT_BYTES = 8 * 12 * len(CLASSES) * 4
"""Of one layer of paint: 1152, more than stays in a graph."""


def paint(seed: int) -> np.ndarray:
    """Float32 1×8×12×3, as bright as pixels are."""
    return np.random.default_rng(seed).uniform(-200, 200, (1, 8, 12, len(CLASSES))).astype(np.float32)


def painted_graph(*layers: np.ndarray, precision: str = "fp32", target: str = "", **facts: str) -> onnx.ModelProto:
    """The model that adds each of `layers`; `facts` are its provenance."""
    provenance = {**facts, **({"target": target} if target else {})}
    model = colour_graph(colour_spec().replace(precision=precision, provenance=provenance))
    nodes = list(model.graph.node)
    at = next(index for index, node in enumerate(nodes) if node.op_type == "ArgMax")
    last = nodes[at].input[0]
    for number, layer in enumerate(layers):
        model.graph.initializer.append(numpy_helper.from_array(layer, f"paint{number}"))
        nodes.insert(at + number, helper.make_node("Add", [last, f"paint{number}"], [f"painted{number}"]))
        last = f"painted{number}"
    nodes[at + len(layers)].input[0] = last
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def write_painted(path: Path, *layers: np.ndarray, **labels: str) -> Path:
    """Writes the model; returns its path."""
    onnx.save(painted_graph(*layers, **labels), path)
    return path


def painted_mask(image: np.ndarray, *layers: np.ndarray) -> np.ndarray:
    """What it gives for an image 1×8×12×3 (BGR), computed here."""
    pixels: np.ndarray = image[..., ::-1].astype(np.float32)
    for layer in layers:
        pixels = pixels + layer
    return pixels.argmax(axis=3).astype(np.uint8)
