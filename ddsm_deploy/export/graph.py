"""From a torch module to a clean ONNX graph: traced, folded, free of the machine's traces, weights halved if wanted."""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from ddsm_deploy.errors import BackendError
from ddsm_deploy.export.sampling import translation_table
from ddsm_deploy.export.sampling_function import attach_body

OPSET = 19
"""Opset 20 renames GridSample's modes, and TensorRT's parsers up to 11.1 then sample nearest without a word."""

DYNAMIC = {"none": (), "batch": (0,), "batch,size": (0, 1, 2)}
"""Axes of the input N×H×W×3 that stay symbolic."""

_AXIS_NAMES = ("N", "H", "W")
_EXAMPLE = (2, 128, 192)

HALF_TOLERANCE = 1e-6
"""Relative: folding a batch norm of scale one moves a float16 weight by an ulp of float32 (6e-8) at most."""


def trace(
    module: nn.Module, size: tuple[int, int], *, dynamic: str, sampling: str, outputs: Sequence[str]
) -> ModelProto:
    """Exports a `DeployModule` at opset 19, batch norms folded into convolutions.

    Args:
        module: takes uint8 N×H×W×3; in evaluation mode.
        size: height and width of the input, pixels; of no meaning where `dynamic` leaves them open.
        dynamic: a key of `DYNAMIC`.
        sampling: a form of `sampling.SAMPLINGS`.
        outputs: names, in the order in which the module gives them.

    Raises:
        BackendError: torch's exporter can't do it.
    """
    axes = DYNAMIC[dynamic]
    # a symbolic axis whose example is 1 would be fixed to 1, and two whose examples are equal might be taken for one
    sizes = [own if axis in axes else fixed for axis, (own, fixed) in enumerate(zip(_EXAMPLE, (1, *size), strict=True))]
    example = torch.zeros(*sizes, 3, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["image"],
                output_names=list(outputs),
                dynamic_shapes=(dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None,
                custom_translation_table=translation_table(sampling),
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, torch._dynamo.exc.UserError) as exc:
        raise BackendError(
            f"torch can't export this network with dynamic={dynamic!r} ({_reason(exc)}); "
            "a static size (--dynamic none) asks least of it"
        ) from exc
    model = program.model_proto
    _strip(model)
    _lead_with_cast(model)
    _name_axes(model, axes)
    attach_body(model)
    return model


def halve_weights(model: ModelProto) -> float:
    """Stores weights of convolutions and matrix products as float16, each with a Cast to float32 behind it.

    Only tensors whose every value is a float16 already (see `HALF_TOLERANCE`) are touched, so the function computed
    stays the same. Runtimes fold the casts when they load the file.

    Returns:
        The share of those weights that now is float16, 0..1, counted in numbers.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    uses = collections.Counter(name for node in graph.node for name in node.input)
    total = halved = 0
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        names = [n for n in node.input[:2] if n in stored] if node.op_type in ("Conv", "Gemm", "MatMul") else []
        for name in names:
            weight = numpy_helper.to_array(stored[name])
            if weight.dtype != np.float32 or weight.ndim < 2:
                continue
            total += weight.size
            half = _as_half(weight)
            if half is None or uses[name] > 1:
                continue
            halved += weight.size
            stored[name].CopyFrom(numpy_helper.from_array(half, name))
            cast = f"{name}.fp32"
            nodes.append(helper.make_node("Cast", [name], [cast], name=f"{cast}.cast", to=TensorProto.FLOAT))
            node.input[list(node.input).index(name)] = cast
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return halved / total if total else 0.0


def _as_half(weight: np.ndarray) -> np.ndarray | None:
    """The nearest float16 values, or None where one of them is not the same number."""
    with np.errstate(over="ignore"):
        half = weight.astype(np.float16)
    same = np.abs(half.astype(np.float32) - weight) <= HALF_TOLERANCE * np.abs(weight)
    return half if bool(same.all()) else None


def _strip(model: ModelProto) -> None:
    """Removes what depends on the machine or repeats: stack traces, documentation, inferred shapes of intermediates."""
    model.ClearField("doc_string")
    del model.metadata_props[:]
    graph = model.graph
    graph.ClearField("doc_string")
    del graph.metadata_props[:], graph.value_info[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        item.ClearField("doc_string")
        del item.metadata_props[:]


def _lead_with_cast(model: ModelProto) -> None:
    """Makes the Cast of the uint8 input the first node and its only reader: TensorRT takes such an input no other way.

    With symbolic sizes the exporter asks the input itself for its shape; the shape of the Cast's result is the same.
    """
    graph = model.graph
    image = graph.input[0].name
    at = next(i for i, node in enumerate(graph.node) if node.op_type == "Cast" and image in node.input)
    nodes = list(graph.node)
    nodes.insert(0, nodes.pop(at))
    for node in nodes[1:]:
        node.input[:] = [nodes[0].output[0] if name == image else name for name in node.input]
    del graph.node[:]
    graph.node.extend(nodes)


def _name_axes(model: ModelProto, axes: Sequence[int]) -> None:
    """Calls the symbolic axes N, H, W at the input and at every output, where they are those of the input."""
    first = model.graph.input[0].type.tensor_type.shape.dim
    names = {first[axis].dim_param: _AXIS_NAMES[axis] for axis in axes}
    for info in (*model.graph.input, *model.graph.output):
        for dim in info.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # the exporter and what it calls warn about their own deprecations and about axes that turn out equal
        warnings.simplefilter("ignore")
        yield


def _reason(exc: BaseException) -> str:
    """The innermost cause's first line, shortened: the exporter's own message is a page long."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(exc)).strip()
    first = text.splitlines()[0] if text else ""
    return f"{type(exc).__name__}: {first[:200]}"
