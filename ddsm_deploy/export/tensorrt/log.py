"""What NVIDIA's texts say: the layers in a builder's verbose log, and the one reason in a heap of messages.

TensorRT-RTX 1.7 ends its verbose log with a line a layer, if profiling verbosity is DETAILED:

    Name: n, LayerType: correlation, Inputs: [ { …, Datatype: Half, … }], …, Metadata: [ONNX Layer: node_Conv_1]

The metadata names the ONNX nodes that the layer computes. TensorRT writes `Format/Datatype` in place of `Datatype`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

_LAYER = re.compile(
    r"^Name: (?P<name>[^,]+), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Outputs): "
)
_DATATYPE = re.compile(r"\bDatatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_NOISE = re.compile(
    r"[(. ]*\bIn \w+ at /\S+:\d+\)?"  # `. In validateTypes at /_src/…/gridSampleNode.cpp:31)`
    r"|\[?\w+\.(?:cpp|h):+[\w: ]+\]:?"  # `[pass.cpp:337: check_turing_op_compatibility]`
    r"|\bI?[A-Z]\w+::\w+: |Error Code \d+: |Invalid Node - \S+"
    r"|(?:API Usage Error|Internal Error|Myelin|Assertion failed:) \("
)

# Kernels that can be a convolution or a product of matrices, before those that only bring their input into form.
_KERNELS = ("correlation", "gemm", "runtime_fusion", "runtime_function")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        kind: NVIDIA's word, as ``correlation`` (a convolution), ``gemm`` or ``kgen`` (a fused pointwise kernel).
        dtype: of its first input, NVIDIA's word, as ``Int8``, ``Half`` or ``Float``; empty without inputs.
        nodes: names of the ONNX nodes that it computes.
    """

    kind: str
    dtype: str
    nodes: tuple[str, ...]


def layers(log: Iterable[str]) -> list[Layer]:
    """The layers that a verbose log tells of, in its order; none where it is of a form not known here."""
    found = []
    for line in log:
        match = _LAYER.match(line)
        if match:
            dtypes = _DATATYPE.findall(match["inputs"])
            nodes = tuple(dict.fromkeys(_NODE.findall(line.rpartition("Metadata: ")[2])))
            found.append(Layer(match["kind"], dtypes[0] if dtypes else "", nodes))
    return found


def node_types(found: Iterable[Layer]) -> dict[str, str]:
    """ONNX node -> type in which it is computed; of several layers of one node the kernel counts."""
    chosen: dict[str, tuple[int, str]] = {}
    for layer in found:
        rank = _KERNELS.index(layer.kind) if layer.kind in _KERNELS else len(_KERNELS)
        for node in layer.nodes:
            if layer.dtype and (node not in chosen or rank < chosen[node][0]):
                chosen[node] = (rank, layer.dtype)
    return {node: dtype for node, (_, dtype) in chosen.items()}


def count_types(types: Mapping[str, str], ops: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Operator -> type -> how many of the graph's nodes are computed so.

    Args:
        types: what `node_types` gave.
        ops: node name -> operator, of the nodes to count. One that no layer names (folded, or fused beyond recognition)
            counts as ``unnamed``.
    """
    counts: dict[str, collections.Counter[str]] = {}
    for node, op in ops.items():
        counts.setdefault(op, collections.Counter())[types.get(node, "unnamed")] += 1
    return {op: dict(sorted(counter.items())) for op, counter in sorted(counts.items())}


def reason(messages: Iterable[str]) -> str:
    """The reason among NVIDIA's error messages, in one line, without source positions.

    A machine without a GPU adds complaints about the CUDA driver to every error; they are left out unless nothing else
    was said.
    """
    clean = [_clean(message) for message in messages]
    clean = [text for text in dict.fromkeys(clean) if text]
    telling = [text for text in clean if not _about_driver(text)]
    return (telling or clean or ["no reason was given"])[0]


def _clean(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = " ".join([line for line in lines if not _about_driver(line)] or lines)
    text = re.sub(r"\s+", " ", _NOISE.sub("", text)).strip(" .")
    while text.endswith(")") and text.count(")") > text.count("("):
        text = text[:-1].rstrip(" .")
    return text[:400]


def _about_driver(text: str) -> bool:
    return "CUDA driver version is insufficient" in text or "Cuda Runtime (In catchCudaError" in text
