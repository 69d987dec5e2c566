"""The fused node and its body: right for any sizes, and taken by whatever reads ONNX without our kernel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, inliner
from sampling_calls import inputs, one_node

from ddsm_deploy.enginefile import Profile
from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.export.fp16 import to_fp16
from ddsm_deploy.export.onnxgraph import plain_graph, value_types
from ddsm_deploy.export.sampling_function import inline_sampling, is_sampling
from ddsm_deploy.export.tensorrt.builder import Job, build
from ddsm_deploy.model.operator import reference

Case = tuple[int, int, int, int, int, int, float]
Run = Callable[[bytes, dict[str, npt.NDArray]], list[npt.NDArray]]

CASE = (2, 4, 3, 9, 5, 7, 2.0)
AXES = {"static": (), "any batch": (0,), "any size": (0, 2, 3)}
FLOATS = {"rtol": 1e-5, "atol": 1e-5}  # coordinates are float32

sizes = st.tuples(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 4, 9, 16, 25]),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 2.0, 40.0, 1e6]),
)


@pytest.fixture(params=AXES)
def axes(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return AXES[request.param]


def feeds_and_truth(case: Case, *, strange: float = 0.0) -> tuple[dict[str, npt.NDArray], npt.NDArray]:
    """Inputs, of which one offset is moved by `strange`, and what the operator makes of them."""
    tensors = inputs(case)
    tensors[3][-1, -1, -1, -1] += strange
    truth = reference(*(tensor.double() for tensor in tensors)).numpy()
    return {f"in{i}": tensor.numpy() for i, tensor in enumerate(tensors)}, truth


def run_onnxruntime(model: onnx.ModelProto, feeds: dict[str, npt.NDArray]) -> list[npt.NDArray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("form", [lambda model: model, inline_sampling], ids=["body", "inlined"])
@settings(max_examples=100, deadline=None)
@given(case=sizes, axes=st.sampled_from(list(AXES.values())), strange=st.sampled_from([0.0, np.nan, np.inf, -1e30]))
@example(case=(1, 1, 1, 1, 1, 1, 0.5), axes=(), strange=0.0)
@example(case=(1, 2, 3, 25, 1, 1, 0.5), axes=(0, 2, 3), strange=np.nan)
def test_body_is_the_operator(need, form: Callable, case: Case, axes: tuple[int, ...], strange: float) -> None:
    """Against the float64 reference: one-pixel maps, odd ones, positions near and far outside, and one of no place."""
    need("onnxruntime")
    feeds, truth = feeds_and_truth(case, strange=strange)
    got, _ = run_onnxruntime(form(one_node(case, axes=axes)), feeds)
    np.testing.assert_allclose(got, truth, **FLOATS)


def test_checker_and_inference(axes: tuple[int, ...]) -> None:
    """The node's result has a known shape: numbers where they are static, the input's names where they are open."""
    model = one_node(CASE, axes=axes)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    attended = inferred.graph.output[0].type.tensor_type.shape
    want = [
        letter if axis in axes else size for axis, (letter, size) in enumerate(zip("BCYX", (2, 3, 5, 7), strict=True))
    ]
    assert [dim.dim_param or dim.dim_value for dim in attended.dim] == want


def test_every_runtime(run: Run, axes: tuple[int, ...]) -> None:
    """No custom op is registered anywhere: ONNX Runtime runs the body, OpenVINO what `inline_sampling` makes of it."""
    feeds, truth = feeds_and_truth(CASE)
    got, _ = run(one_node(CASE, axes=axes).SerializeToString(), feeds)
    np.testing.assert_allclose(got, truth, **FLOATS)


def test_onnx_can_inline_it_too(run: Run, axes: tuple[int, ...]) -> None:
    inlined = inliner.inline_local_functions(one_node(CASE, axes=axes))
    onnx.checker.check_model(inlined, full_check=True)
    assert not any(map(is_sampling, inlined.graph.node))
    feeds, truth = feeds_and_truth(CASE)
    got, _ = run(inlined.SerializeToString(), feeds)
    np.testing.assert_allclose(got, truth, **FLOATS)


def test_tensorrt_builds_the_body(axes: tuple[int, ...], tmp_path: Path, need) -> None:
    need("tensorrt_rtx")
    onnx.save(one_node(CASE, axes=axes), tmp_path / "fused.onnx")
    profiles = {}
    if axes:
        shapes = {name: array.shape for name, array in feeds_and_truth(CASE)[0].items()}
        smallest = {name: tuple(1 if a in axes else s for a, s in enumerate(shape)) for name, shape in shapes.items()}
        profiles = {name: Profile(min=smallest[name], opt=shapes[name], max=shapes[name]) for name in shapes}
    job = Job(
        target="tensorrt-rtx",
        onnx=tmp_path / "fused.onnx",
        engine=tmp_path / "fused.engine",
        sampling=("linear",),  # read back from TensorRT's network: it took the body
        profiles=profiles,
    )
    built = build(job)
    assert built.outputs[0].name == "attended"
    assert built.outputs[0].shape == tuple(-1 if a in axes else s for a, s in enumerate((2, 3, 5, 7)))


def test_inlining_leaves_plain_onnx(axes: tuple[int, ...]) -> None:
    fused = one_node(CASE, axes=axes)
    before = fused.SerializeToString(deterministic=True)
    model = inline_sampling(fused)
    assert fused.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 19)]
    assert not model.functions
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(name == "mix" or name.startswith("call/") for name in names)
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    if 2 not in axes:  # all that depends on the map's size is known
        assert not {"Shape", "Range", "Cast", "Pow"} & {node.op_type for node in model.graph.node}
    assert inline_sampling(model) is model


def test_two_calls_do_not_meet(run: Run) -> None:
    """The second call attends with the first one's result as its value."""
    model = one_node((2, 4, 3, 9, 5, 7, 2.0))
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.input[2], second.output[0], second.name = "attended", "again", ""
    model.graph.node.insert(1, second)
    model.graph.node[2].input[0] = "again"
    model.graph.output[0].name = "again"
    tensors = inputs(CASE)
    query, key, value, offset = (tensor.double() for tensor in tensors)
    truth = reference(query, key, reference(query, key, value, offset), offset).numpy()
    inlined = inline_sampling(model)
    onnx.checker.check_model(inlined, full_check=True)
    got, _ = run(inlined.SerializeToString(), {f"in{i}": tensor.numpy() for i, tensor in enumerate(tensors)})
    np.testing.assert_allclose(got, truth, **FLOATS)


def test_a_node_without_its_body_is_refused() -> None:
    model = one_node(CASE)
    del model.functions[:]
    with pytest.raises(ArtifactError, match="DynamicSampleAttention without its body; export it anew"):
        inline_sampling(model)


def test_plain_graphs_keep_the_node_and_inline_all_else() -> None:
    model = one_node(CASE)
    twice = helper.make_function(
        "other", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], [helper.make_opsetid("", 19)]
    )
    model.functions.append(twice)
    model.opset_import.append(helper.make_opsetid("other", 1))
    model.graph.node.append(helper.make_node("Twice", ["mixed"], ["more"], domain="other"))
    model.graph.output[1].name = "more"
    plain = plain_graph(model)
    onnx.checker.check_model(plain, full_check=True)
    assert [node.op_type for node in plain.graph.node] == ["DynamicSampleAttention", "Conv", "Add"]
    assert [function.name for function in plain.functions] == ["DynamicSampleAttention"]


def test_float16_leaves_the_node_in_float(run: Run) -> None:
    half = to_fp16(one_node(CASE))
    onnx.checker.check_model(half, full_check=True)
    types = value_types(half)
    (node,) = filter(is_sampling, half.graph.node)
    assert {types[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    (convolution,) = (node for node in half.graph.node if node.op_type == "Conv")
    assert types[convolution.input[0]] == TensorProto.FLOAT16
    feeds, truth = feeds_and_truth(CASE)
    got, _ = run(half.SerializeToString(), feeds)
    np.testing.assert_allclose(got, truth, **FLOATS)
