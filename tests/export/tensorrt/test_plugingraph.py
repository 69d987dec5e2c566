"""What TensorRT's parser gets where a plugin is to sample: no body to fall back to, and the same function."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_graphs as graphs
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from sampling_definition import by_loops

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.export.fp16 import to_fp16
from ddsm_deploy.export.onnxgraph import load_graph, save_graph
from ddsm_deploy.export.sampling_function import attach_body, inline_sampling, is_sampling
from ddsm_deploy.export.tensorrt.builder import Job, build
from ddsm_deploy.export.tensorrt.plugingraph import plugin_graph, sampling_nodes
from ddsm_deploy.onnxfile import read_spec

SIZE = (2, 6, 5, 7)
"""B, C, Y, X of `network`'s input."""


class DynamicSampleAttention(OpRun):
    """The definition in the place of the node, for onnx's own evaluator: in float64, in and out in the node's type."""

    op_domain = "ddsm"

    def _run(self, query, key, value, offset, **attributes):  # type: ignore[no-untyped-def]
        assert query.dtype == key.dtype == value.dtype
        return (by_loops(query, key, value, offset).astype(value.dtype),)


def network(*, also_read: bool = False) -> ModelProto:
    """Convolutions, two sampling nodes in a row, a convolution; with `also_read` the first result is an output too."""
    random = np.random.default_rng(5)
    nodes, stored = [], {}

    def convolve(source: str, name: str, channels: int) -> None:
        stored[f"{name}.weight"] = random.standard_normal((channels, SIZE[1], 1, 1)).astype(np.float32) * 0.5
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight"], [name], name=name))

    for index, source in enumerate(("x", "first")):
        names = [f"{name}{index}" for name in ("query", "key", "value", "offset")]
        for name, channels in zip(names, (4, 4, 6, 2 * 4), strict=True):
            if name == "value1":
                names[2] = source  # the second samples the first's result itself
            else:
                convolve(source, name, channels)
        result = ("first", "second")[index]
        attributes = {"samples": 4, "plugin_namespace": "ddsm", "plugin_version": "1"}
        nodes.append(
            helper.make_node("DynamicSampleAttention", names, [result], name=result, domain="ddsm", **attributes)
        )
    convolve("second", "y", 3)
    outputs = [("y", graphs.F32, (2, 3, 5, 7)), *([("first", graphs.F32, SIZE)] if also_read else [])]
    graph = helper.make_graph(
        nodes,
        "sampling",
        [helper.make_tensor_value_info("x", graphs.F32, SIZE)],
        [helper.make_tensor_value_info(*output) for output in outputs],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("ddsm", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    attach_body(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def evaluated(model: ModelProto) -> list[np.ndarray]:
    return ReferenceEvaluator(model, new_ops=[DynamicSampleAttention]).run(None, {"x": image()})


def image() -> np.ndarray:
    return np.random.default_rng(6).standard_normal(SIZE).astype(np.float32)


def kinds(model: ModelProto) -> list[int]:
    """Types of what the sampling nodes read and give, in the order of the graph."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {i.name: i.type.tensor_type.elem_type for i in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return [types[name] for node in filter(is_sampling, model.graph.node) for name in (*node.input, *node.output)]


@pytest.mark.parametrize("also_read", [False, True])
def test_float32_keeps_its_nodes_and_loses_their_body(also_read: bool, need) -> None:
    need("onnxruntime")
    import onnxruntime

    model = network(also_read=also_read)
    made = plugin_graph(model)
    onnx.checker.check_model(made, full_check=True)
    assert not made.functions
    assert model.functions  # a copy was changed, not the model
    assert sampling_nodes(made) == sampling_nodes(model) == 2
    assert kinds(made) == [graphs.F32] * 10
    for node in filter(is_sampling, made.graph.node):
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"samples": 4, "plugin_namespace": b"ddsm", "plugin_version": b"1", "aot": 1}
    session = onnxruntime.InferenceSession(inline_sampling(model).SerializeToString())
    for got, want in zip(evaluated(made), session.run(None, {"x": image()}), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("also_read", [False, True])
def test_float16_is_sampled_as_it_is(also_read: bool) -> None:
    half = to_fp16(network(also_read=also_read))
    assert kinds(half) == [graphs.F32] * 10  # the body computes in float32, so casts lie all round it
    made = plugin_graph(half)
    onnx.checker.check_model(made, full_check=True)
    assert kinds(made) == [graphs.F16, graphs.F16, graphs.F16, graphs.F32, graphs.F16] * 2
    # what remains: offsets to float32, the network's own input and outputs
    assert sum(node.op_type == "Cast" for node in made.graph.node) == 2 + 1 + (2 if also_read else 1)
    for got, want in zip(evaluated(made), evaluated(half), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)  # float16 has 11 bits, and rounds once more here


def test_open_axes_stay_open() -> None:
    model = network()
    for info in (model.graph.input[0], model.graph.output[0]):
        info.type.tensor_type.shape.dim[0].dim_param = "N"
    made = plugin_graph(model)
    onnx.checker.check_model(made, full_check=True)
    shapes = {info.name: info.type.tensor_type.shape.dim for info in made.graph.value_info}
    assert [dim.dim_value for dim in shapes["first"]][1:] == list(SIZE[1:])
    assert not shapes["first"][0].dim_value


def test_a_graph_without_sampling_nodes_has_no_place_for_a_plugin() -> None:
    with pytest.raises(ConfigError, match=r"written otherwise; export it with: .*--sampling fused"):
        plugin_graph(inline_sampling(network()))


def test_a_parser_without_the_plugin_refuses(tmp_path: Path, need) -> None:
    """Nothing else may stand in for the plugin in silence; with its body the same file is taken."""
    need("tensorrt_rtx")
    job = Job(
        target="tensorrt-rtx", onnx=tmp_path / "graph.onnx", engine=tmp_path / "x.engine", sampling=("linear",) * 2
    )
    onnx.save(network(), job.onnx)
    assert build(job).version
    onnx.save(plugin_graph(network()), job.onnx)
    with pytest.raises(BackendError, match=r"DynamicSampleAttention 'first': .*"):
        build(job)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_whole_network_is_taken(tiny_fused: Path, tmp_path: Path, precision: str) -> None:
    """Six sampling nodes, two a level; the rest stays as exported, and the file passes all of ONNX's checks."""
    model = load_graph(tiny_fused)
    model = to_fp16(model) if precision == "fp16" else model
    made = plugin_graph(model)
    save_graph(made, tmp_path / "made.onnx", read_spec(tiny_fused))
    assert sampling_nodes(made) == sampling_nodes(model) == 6
    element = {"fp32": graphs.F32, "fp16": graphs.F16}[precision]
    assert kinds(made) == [element, element, element, graphs.F32, element] * 6
    other = [node.name for node in made.graph.node if node.op_type not in ("Cast", "DynamicSampleAttention")]
    assert other == [node.name for node in model.graph.node if node.op_type not in ("Cast", "DynamicSampleAttention")]
    assert not any(node.op_type == "GridSample" for node in made.graph.node)
