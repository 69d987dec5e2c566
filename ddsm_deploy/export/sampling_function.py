"""The sampling operator as one ONNX node with a body: how the node is defined, and how it becomes standard operators.

A fused file holds nodes ``ddsm::DynamicSampleAttention``, which a runtime with our kernel computes by that, and one
function of the same name, the body, which any other runtime inlines. The body is the ``portable`` form of `sampling`,
written for any shapes: what depends on them it reads from its inputs. So it folds to the portable form's few nodes
where shapes are static, in the runtimes as in `inline_sampling`. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx.shape_inference
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

Shape = list[int | None]
"""Length of each axis; None where it is open."""

VERSION = 1
"""Of the domain."""

OFFSET = 3
"""Which input of a node holds the offsets; before it are query, key and value."""

PLUGIN = {"plugin_namespace": SAMPLING_DOMAIN, "plugin_version": "1"}
"""Attributes of each node, by which TensorRT's parser finds a plugin; it takes the body where there is none."""

# Shapes as in `model.operator.dynamic_sample_attention`. Sizes are counted in integers up to the Range: ONNX Runtime's
# shape inference takes a size for an integer even behind a Cast. The Where is explained in `sampling._near`. The last
# Reshape changes nothing, but tells shape inference what the Slices hide from it: so shapes behind the node are known.
_BODY = f"""
<opset_import: ["" : 19], domain: "{SAMPLING_DOMAIN}">
{SAMPLING_OP} <samples, plugin_namespace, plugin_version> (query, key, value, offset) => (result)
{{
  none = Constant <value = float {{0.0}}> ()
  one = Constant <value = float {{1.0}}> ()
  two = Constant <value = float {{2.0}}> ()
  exponent = Constant <value = float {{-0.5}}> ()
  first = Constant <value = int64 {{0}}> ()
  step = Constant <value = int64 {{1}}> ()
  start = Constant <value = int64[1] {{0}}> ()
  end = Constant <value = int64[1] {{9223372036854775807}}> ()
  axis_1 = Constant <value = int64[1] {{1}}> ()
  axis_2 = Constant <value = int64[1] {{2}}> ()
  column_shape = Constant <value = int64[3] {{1, -1, 1}}> ()
  row_shape = Constant <value = int64[3] {{1, 1, -1}}> ()
  pair_shape = Constant <value = int64[3] {{2, 1, 1}}> ()
  x_then_y = Constant <value = int64[2] {{1, 0}}> ()
  pairs_head = Constant <value = int64[3] {{0, -1, 2}}> ()
  grid_head = Constant <value = int64[2] {{0, -1}}> ()
  sampled_head = Constant <value = int64[3] {{0, 0, -1}}> ()

  map_shape = Shape <start = 2, end = 4> (offset)
  rows = Shape <start = 2, end = 3> (offset)
  columns = Shape <start = 3, end = 4> (offset)
  height = Cast <to = 1> (rows)
  width = Cast <to = 1> (columns)
  row_count = Squeeze (rows)
  row_numbers = Range (first, row_count, step)
  row_floats = Cast <to = 1> (row_numbers)
  row_doubles = Mul (row_floats, two)
  row_odds = Add (row_doubles, one)
  row_shares = Div (row_odds, height)
  row_centres = Sub (row_shares, one)
  y_centres = Reshape (row_centres, column_shape)
  y_nothing = Mul (y_centres, none)
  y_base = Concat <axis = 0> (y_nothing, y_centres)
  column_count = Squeeze (columns)
  column_numbers = Range (first, column_count, step)
  column_floats = Cast <to = 1> (column_numbers)
  column_doubles = Mul (column_floats, two)
  column_odds = Add (column_doubles, one)
  column_shares = Div (column_odds, width)
  column_centres = Sub (column_shares, one)
  x_centres = Reshape (column_centres, row_shape)
  x_nothing = Mul (x_centres, none)
  x_base = Concat <axis = 0> (x_centres, x_nothing)
  x_pixel = Div (two, width)
  y_pixel = Div (two, height)
  pixel = Concat <axis = 0> (x_pixel, y_pixel)
  pixel_pair = Reshape (pixel, pair_shape)

  pairs_shape = Concat <axis = 0> (pairs_head, map_shape)
  pairs = Reshape (offset, pairs_shape)
  swapped = Gather <axis = 2> (pairs, x_then_y)
  scaled = Mul (swapped, pixel_pair)
  placed_y = Add (scaled, y_base)
  placed = Add (placed_y, x_base)
  reach = Abs (placed)
  near = Less (reach, two)
  held = Where (near, placed, two)
  points = Transpose <perm = [0, 1, 3, 4, 2]> (held)
  grid_shape = Concat <axis = 0> (grid_head, columns, axis_2)
  grid = Reshape (points, grid_shape)

  both = Concat <axis = 1> (key, value)
  read = GridSample <mode = "bilinear", padding_mode = "zeros", align_corners = 0> (both, grid)
  sampled_shape = Concat <axis = 0> (sampled_head, map_shape)
  sampled = Reshape (read, sampled_shape)
  keys_end = Shape <start = 1, end = 2> (query)
  keys = Slice (sampled, start, keys_end, axis_1)
  values = Slice (sampled, keys_end, end, axis_1)
  query_once = Unsqueeze (query, axis_2)
  products = Mul (keys, query_once)
  sums = ReduceSum <keepdims = 1> (products, axis_1)
  width_of_keys = Cast <to = 1> (keys_end)
  scale = Pow (width_of_keys, exponent)
  scores = Mul (sums, scale)
  affinity = Softmax <axis = 2> (scores)
  weighted = Mul (values, affinity)
  attended = ReduceSum <keepdims = 0> (weighted, axis_2)
  value_shape = Shape (value)
  result = Reshape (attended, value_shape)
}}
"""


def sampling_function() -> FunctionProto:
    """The body: opset 19, float32, any batch, sizes, K, V and N."""
    function = parser.parse_function(_BODY)
    for node in function.node:
        node.name = node.output[0]  # ONNX Runtime 1.20 refuses the file where it inlines nodes without names
    return function


def is_sampling(node: NodeProto) -> bool:
    """Whether a node is the fused operator."""
    return node.domain == SAMPLING_DOMAIN and node.op_type == SAMPLING_OP


def attach_body(model: ModelProto) -> None:
    """Makes a model whose nodes an exporter wrote a whole fused file; one without such nodes stays as it is."""
    nodes = [node for node in model.graph.node if is_sampling(node)]
    for node in nodes:
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)  # the exporter's order is by chance
        del node.attribute[:]
        node.attribute.extend(attributes)
    if nodes:
        model.functions.append(sampling_function())


def inline_sampling(model: ModelProto) -> ModelProto:
    """The portable form of a fused model: bodies in place of nodes, and what static shapes decide folded to constants.

    Args:
        model: any; one without fused nodes is given back as it is, another one is copied.

    Raises:
        ArtifactError: a fused node whose body is not in the file.
    """
    if not any(map(is_sampling, model.graph.node)):
        return model
    body = next((f for f in model.functions if (f.domain, f.name) == (SAMPLING_DOMAIN, SAMPLING_OP)), None)
    if body is None:
        raise ArtifactError(f"the graph has a node {SAMPLING_DOMAIN}::{SAMPLING_OP} without its body; export it anew")
    copy, shapes = ModelProto(), _shapes(model)
    copy.CopyFrom(model)
    graph = copy.graph
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if is_sampling(node):
            written, constants = _folded(_written_out(node, body), shapes)
            nodes.extend(written)
            graph.initializer.extend(constants)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    _forget(copy)
    return copy


def _written_out(node: NodeProto, body: FunctionProto) -> list[NodeProto]:
    """The body's nodes with names of their own, less the last two, which are there for shape inference alone."""
    result = node.output[0]
    names = {"": "", **dict(zip(body.input, node.input, strict=True))}
    *inner, _, last = body.node
    names[last.input[0]] = result
    nodes = []
    for each in inner:
        copy = NodeProto()
        copy.CopyFrom(each)
        copy.name = f"{node.name or result}/{each.output[0]}"
        copy.input[:] = [names[name] for name in each.input]
        names.update((name, f"{result}/{name}") for name in each.output if name not in names)
        copy.output[:] = [names[name] for name in each.output]
        nodes.append(copy)
    return nodes


def _folded(nodes: Sequence[NodeProto], shapes: dict[str, Shape]) -> tuple[list[NodeProto], list[TensorProto]]:
    """What remains to be computed at run time, and the constants that it reads."""
    constant: dict[str, None] = {}
    folding, rest = [], []
    for node in nodes:
        lengths = _lengths(node, shapes) if node.op_type == "Shape" else None
        if lengths is not None:
            tensor = numpy_helper.from_array(np.array(lengths, dtype=np.int64))
            node = helper.make_node("Constant", [], node.output, value=tensor)
        if all(name in constant for name in node.input):
            folding.append(node)
            constant.update(dict.fromkeys(node.output))
        else:
            rest.append(node)
    read = {name for node in rest for name in node.input}
    wanted = [name for name in constant if name in read]
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    graph = helper.make_graph(folding, "constants", [], outputs)
    arrays = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])).run(None, {})
    return rest, [numpy_helper.from_array(array, name) for name, array in zip(wanted, arrays, strict=True)]


def _lengths(node: NodeProto, shapes: dict[str, Shape]) -> list[int] | None:
    """What a Shape node gives, if it is known."""
    ends = {attribute.name: attribute.i for attribute in node.attribute}
    lengths = shapes.get(node.input[0], [None])[ends.get("start", 0) : ends.get("end")]
    return None if None in lengths else [length for length in lengths if length is not None]


def _shapes(model: ModelProto) -> dict[str, Shape]:
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        info.name: [dim.dim_value if dim.HasField("dim_value") else None for dim in info.type.tensor_type.shape.dim]
        for info in (*inferred.value_info, *inferred.input, *inferred.output)
        if info.type.tensor_type.HasField("shape")
    }


def _forget(model: ModelProto) -> None:
    """Removes the body and the domain, which nothing uses any more."""
    functions = [f for f in model.functions if (f.domain, f.name) != (SAMPLING_DOMAIN, SAMPLING_OP)]
    imports = [entry for entry in model.opset_import if entry.domain != SAMPLING_DOMAIN]
    del model.functions[:], model.opset_import[:]
    model.functions.extend(functions)
    model.opset_import.extend(imports)
