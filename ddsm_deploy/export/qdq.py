"""INT8 as explicit Q/DQ pairs in the graph: which convolutions can have them, and how each target wants them written.

A quantized convolution reads ``DequantizeLinear(QuantizeLinear(x))`` and a weight that is stored as int8 with a
DequantizeLinear behind it; the runtime fuses the three into one INT8 convolution. Weights are symmetric, one scale an
output channel. Biases stay float: TensorRT refuses INT32 ones, and the CPU runtimes convert them on their own.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.export.onnxgraph import drop_unused, value_types

Range = tuple[float, float]
"""Lowest and highest value of a tensor that calibration found worth telling apart."""

WEIGHT_BITS = (7, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a target wants its Q/DQ pairs.

    Attributes:
        signed: activations as int8 with zero point 0; else uint8, with a zero point where a tensor has negative values.
        outputs: pairs behind a convolution too (behind its activation, if it has one), and round additions, so that
            INT8 tensors go from layer to layer; else pairs only in front of convolutions.
        half_scales: scales of activations are float16 numbers as well, as those of weights always are, so that the
            float16 form of the graph computes with the same ones.
    """

    signed: bool
    outputs: bool
    half_scales: bool = False


SCHEMES = {
    "tensorrt": Scheme(signed=True, outputs=False, half_scales=True),
    "onnxruntime": Scheme(signed=False, outputs=True),
    "openvino": Scheme(signed=False, outputs=False),
}
"""Of each target. TensorRT takes int8 with zero point 0 alone, and reads uint8 as int8 with a mere warning."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution that can be quantized.

    Attributes:
        name: of its node.
        label: its weight's name in the network, for people.
        block: the part of the network that it belongs to, as far as its weight's name tells.
        data: the tensor that it convolves.
        result: the tensor that it gives, behind a Clip or Relu that follows it alone.
        weights: how many numbers its kernel has.
    """

    name: str
    label: str
    block: str
    data: str
    result: str
    weights: int


def layers(model: ModelProto) -> list[Layer]:
    """The convolutions of a `plain_graph` that have stored weights, in the graph's order."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = _readers(model)
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in stored:
            weight = stored[node.input[1]]
            found.append(
                Layer(
                    name=node.name,
                    label=_label(weight.name, node.name),
                    block=_block(weight.name, node.name),
                    data=node.input[0],
                    result=_result(node, readers),
                    weights=int(np.prod(weight.dims)),
                )
            )
    return found


def calibrated_tensors(model: ModelProto) -> list[str]:
    """Names of the tensors whose ranges `insert_qdq` may need, in the graph's order."""
    names: dict[str, None] = {}
    for layer in layers(model):
        names.update(dict.fromkeys((layer.data, layer.result)))
    for node in model.graph.node:
        if node.op_type == "Add":
            names.update(dict.fromkeys((*node.input, node.output[0])))
    stored = {tensor.name for tensor in model.graph.initializer}
    types = value_types(model)  # graphs of open size add up integers too
    return [name for name in names if name not in stored and types.get(name) == TensorProto.FLOAT]


def insert_qdq(
    model: ModelProto,
    ranges: Mapping[str, Range],
    quantized: Collection[str],
    scheme: Scheme,
    *,
    weight_bits: int = 8,
) -> ModelProto:
    """A copy of a float32 graph with Q/DQ pairs for the named convolutions.

    Args:
        model: a `plain_graph`, float32, opset 19.
        ranges: of every tensor in `calibrated_tensors`.
        quantized: names of `layers`.
        scheme: how the target wants them.
        weight_bits: 8, or 7 for processors without VNNI, whose 16-bit sums of uint8 × int8 products saturate.

    Raises:
        ConfigError: a name that is no layer, or such a number of bits.
        InputError: the range of a tensor is missing or not finite.
    """
    known = {layer.name: layer for layer in layers(model)}
    if unknown := sorted(set(quantized) - set(known)):
        raise ConfigError(f"no convolution is called {unknown[0]!r}; `layers` names the {len(known)} that there are")
    if weight_bits not in WEIGHT_BITS:
        raise ConfigError(f"weights of {weight_bits} bits; expected 7 or 8")
    copy = ModelProto()
    copy.CopyFrom(model)
    _Writer(copy, ranges, scheme, weight_bits).write(
        [known[layer.name] for layer in known.values() if layer.name in quantized]
    )
    return copy


class _Writer:
    """Writes the pairs into one graph."""

    def __init__(self, model: ModelProto, ranges: Mapping[str, Range], scheme: Scheme, weight_bits: int) -> None:
        self.graph = model.graph
        self.ranges = ranges
        self.scheme = scheme
        self.largest = 2 ** (weight_bits - 1) - 1
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.readers = _readers(model)
        self.before: dict[str, list[NodeProto]] = collections.defaultdict(list)  # node -> what goes in front of it
        self.behind: dict[str, list[NodeProto]] = collections.defaultdict(list)  # tensor -> what goes behind its maker

    def write(self, quantized: list[Layer]) -> None:
        nodes = {node.name: node for node in self.graph.node}
        tensors = dict.fromkeys(layer.data for layer in quantized)
        everywhere: set[str] = set()
        if self.scheme.outputs:
            everywhere = {layer.result for layer in quantized}
            everywhere |= set(self._additions(tensors.keys() | everywhere))
            tensors.update(dict.fromkeys(sorted(everywhere)))
        pairs = {name: self._pair(name) for name in tensors}
        for layer in quantized:
            node = nodes[layer.name]
            node.input[0] = pairs[layer.data]
            node.input[1] = self._weight(node)
        outputs = {info.name for info in self.graph.output}
        for name in everywhere - outputs:
            for node in self.graph.node:
                node.input[:] = [pairs[name] if each == name else each for each in node.input]
        self._arrange()
        drop_unused(self.graph)

    def _additions(self, known: set[str]) -> Iterator[str]:
        """Operands and sums of the additions of which one operand is quantized anyway."""
        for node in self.graph.node:
            tensors = (*node.input, *node.output)
            if node.op_type == "Add" and self.ranges.keys() >= set(tensors) and known.intersection(node.input):
                known |= set(tensors)
                yield from tensors

    def _pair(self, name: str) -> str:
        """QuantizeLinear and DequantizeLinear behind a tensor; the name of the result."""
        scale, zero = activation_scale(self._range(name), self.scheme)
        kind = np.int8 if self.scheme.signed else np.uint8
        scale_name = self._store(f"{name}.scale", np.array(scale, dtype=np.float32))
        zero_name = self._store(f"{name}.zero", np.array(zero, dtype=kind))
        self.behind[name] += [
            helper.make_node("QuantizeLinear", [name, scale_name, zero_name], [f"{name}.q"], name=f"{name}.q"),
            helper.make_node(
                "DequantizeLinear", [f"{name}.q", scale_name, zero_name], [f"{name}.dq"], name=f"{name}.dq"
            ),
        ]
        return f"{name}.dq"

    def _weight(self, node: NodeProto) -> str:
        name = node.input[1]
        if f"{name}.q" not in self.stored:  # else another convolution reads the same weight
            weight = numpy_helper.to_array(self.stored[name]).astype(np.float32)
            scale = weight_scales(weight, self.largest)
            shaped = scale.reshape(-1, *[1] * (weight.ndim - 1))
            numbers = np.rint(weight / shaped).clip(-self.largest, self.largest).astype(np.int8)
            inputs = [
                self._store(f"{name}.q", numbers),
                self._store(f"{name}.scale", scale),
                self._store(f"{name}.zero", np.zeros(len(scale), dtype=np.int8)),
            ]
            made = helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], name=f"{name}.dq", axis=0)
            self.before[node.name].append(made)
        return f"{name}.dq"

    def _range(self, name: str) -> Range:
        low, high = self.ranges.get(name, (np.nan, np.nan))
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise InputError(f"calibration gave no usable range for the tensor {name!r} ({low}..{high})")
        return low, high

    def _store(self, name: str, array: np.ndarray) -> str:
        if name not in self.stored:
            self.stored[name] = numpy_helper.from_array(array, name)
            self.graph.initializer.append(self.stored[name])
        return name

    def _arrange(self) -> None:
        """Puts the new nodes where the order of the graph stays topological."""
        arranged: list[NodeProto] = []
        for info in self.graph.input:
            arranged += self.behind.get(info.name, [])
        for node in list(self.graph.node):
            arranged += self.before.get(node.name, [])
            arranged.append(node)
            for name in node.output:
                arranged += self.behind.get(name, [])
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(arranged)


def activation_scale(values: Range, scheme: Scheme) -> tuple[float, int]:
    """Scale and zero point of a tensor: ``real = scale · (number - zero point)``; zero is always exact."""
    low, high = min(values[0], 0.0), max(values[1], 0.0)
    scale = max(-low, high) / 127 if scheme.signed else (high - low) / 255
    scale = float(_up_to_half(np.array([scale]))[0]) if scheme.half_scales else float(np.float32(scale))
    scale = scale or 1.0  # a tensor that is zero throughout
    return scale, 0 if scheme.signed else int(np.clip(np.rint(-low / scale), 0, 255))


def weight_scales(weight: np.ndarray, largest: int) -> np.ndarray:
    """One scale an output channel (axis 0), float32; 1 for a channel of zeros.

    Float16 numbers for every target, so that the INT8 weights of all are the same bytes, and in a bundle once.
    """
    scale = _up_to_half(np.abs(weight).reshape(len(weight), -1).max(axis=1).astype(np.float64) / largest)
    return np.where(scale > 0, scale, 1.0).astype(np.float32)


def _up_to_half(scale: np.ndarray) -> np.ndarray:
    """The next float16 number that is not smaller: as the numbers are counted in the scale that is written, this only
    makes the steps a little coarser (by 0.1 % at most, for scales above 6e-5)."""
    half = scale.astype(np.float16)
    return np.where(half.astype(np.float64) < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    readers: dict[str, list[NodeProto]] = collections.defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    return readers


def _result(conv: NodeProto, readers: Mapping[str, list[NodeProto]]) -> str:
    after = readers.get(conv.output[0], [])
    if len(after) == 1 and after[0].op_type in ("Clip", "Relu"):
        return str(after[0].output[0])
    return str(conv.output[0])


def _label(weight: str, node: str) -> str:
    """``network.backbone.blocks.3.1.conv_pw.weight`` -> ``backbone.blocks.3.1.conv_pw``."""
    return weight.removeprefix("network.").removesuffix(".fp32").removesuffix(".weight") or node


def _block(weight: str, node: str) -> str:
    """``network.backbone.blocks.3.1.conv_pw.weight`` -> ``backbone.blocks.3``: up to the first number."""
    parts = _label(weight, node).split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: at + 1])
    return parts[0] if len(parts) > 1 else node
