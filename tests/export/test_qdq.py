"""INT8 as Q/DQ pairs: the arithmetic against numpy's, the form that each target wants, and that runtimes use it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from outlier_graph import outlier_graph
from processor import WEIGHT_BITS

from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines import open_engine
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.export.fp16 import to_fp16
from ddsm_deploy.export.onnxgraph import plain_graph, save_graph, value_types, with_outputs
from ddsm_deploy.export.qdq import (
    SCHEMES,
    activation_scale,
    calibrated_tensors,
    insert_qdq,
    layers,
    weight_scales,
)
from ddsm_deploy.images import read_image
from ddsm_deploy.spec import ModelSpec

Run = Callable[..., list[np.ndarray]]

SPEC = ModelSpec(classes=tuple("abcdefghijk"), height=64, width=96)


@pytest.fixture(scope="module")
def model(tiny_onnx: Path) -> onnx.ModelProto:
    return plain_graph(onnx.load(tiny_onnx))


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest, need) -> str:
    need(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[np.ndarray]:
    frames = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:4]]
    return [cv2.resize(frame, (96, 64))[np.newaxis] for frame in frames]


@pytest.fixture(scope="module")
def ranges(model: onnx.ModelProto, images: list[np.ndarray], need) -> dict[str, tuple[float, float]]:
    """Of every tensor that may be quantized: its ends over the images."""
    need("onnxruntime")
    import onnxruntime

    names = calibrated_tensors(model)
    session = onnxruntime.InferenceSession(with_outputs(model, names).SerializeToString())
    values = [session.run(names, {"image": image}) for image in images]
    return {
        name: (min(float(v.min()) for v in each), max(float(v.max()) for v in each))
        for name, each in zip(names, zip(*values, strict=True), strict=True)
    }


def quantized(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]], target: str) -> onnx.ModelProto:
    names = [layer.name for layer in layers(model)]
    return insert_qdq(model, ranges, names, SCHEMES[target], weight_bits=WEIGHT_BITS)


def nodes_of(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


@pytest.mark.parametrize(
    ("values", "target", "expected"),
    [
        ((-1.0, 3.0), "onnxruntime", (4 / 255, 64)),  # 1 / (4 / 255) = 63.75
        ((0.0, 6.0), "openvino", (6 / 255, 0)),
        ((2.0, 5.0), "openvino", (5 / 255, 0)),  # zero is always in the range
        ((-5.0, -2.0), "openvino", (5 / 255, 255)),
        ((0.0, 0.0), "openvino", (1.0, 0)),
    ],
)
def test_scale_of_an_activation(values: tuple[float, float], target: str, expected: tuple[float, int]) -> None:
    scale, zero = activation_scale(values, SCHEMES[target])
    assert scale == pytest.approx(expected[0], rel=1e-6)
    assert zero == expected[1]


@given(low=st.floats(-1e4, 1e4), high=st.floats(-1e4, 1e4))
def test_scale_for_tensorrt_is_a_half_number_that_covers_the_range(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero = activation_scale((low, high), SCHEMES["tensorrt"])
    assert zero == 0
    assert float(np.float16(scale)) == scale
    largest = max(-low, high, 0.0)
    assert scale * 127 >= largest * (1 - 1e-7)
    if largest > 1e-2:  # above float16's subnormal numbers
        assert scale * 127 <= largest * 1.002


@given(st.integers(0, 2**32 - 1), st.sampled_from([127, 63]))
def test_scales_of_weights(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(4, 3, 2, 2)) * 10.0 ** rng.uniform(-3, 1, (4, 1, 1, 1))).astype(np.float32)
    weight[2] = 0
    scales = weight_scales(weight, largest)
    assert scales.dtype == np.float32 and scales[2] == 1
    steps = np.rint(weight / scales.reshape(-1, 1, 1, 1))
    assert np.abs(steps).max() <= largest  # nothing is clipped
    assert np.abs(steps[[0, 1, 3]]).reshape(3, -1).max(axis=1).min() >= largest - 3  # and hardly one is wasted
    np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)


def test_weights_are_the_same_for_every_target(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]]) -> None:
    """So that a bundle of all has them once."""
    found = []
    for target in SCHEMES:
        tensors = {tensor.name: tensor for tensor in quantized(model, ranges, target).graph.initializer}
        dequantized = [node.input[0] for node in nodes_of(quantized(model, ranges, target), "DequantizeLinear")]
        found.append({name: tensors[name].SerializeToString() for name in dequantized if name in tensors})
    assert len(found[0]) > 40
    assert found[0] == found[1] == found[2]


def test_arithmetic_is_that_of_the_specification(run: Run) -> None:
    """A 1×1 convolution against numpy: round half to even, saturate, multiply integers, scale."""
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "net.weight"], ["y"], name="conv")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 7])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5, 7])],
        [numpy_helper.from_array(weight.reshape(4, 3, 1, 1), "net.weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    x = rng.normal(size=(1, 3, 5, 7)).astype(np.float32) * 2
    for target, low, high in (("tensorrt", -127, 127), ("openvino", 0, 255)):
        scheme = SCHEMES[target]
        result = insert_qdq(model, {"x": (-3.0, 4.0)}, ["conv"], scheme, weight_bits=WEIGHT_BITS)
        largest = 2 ** (WEIGHT_BITS - 1) - 1
        scale, zero = activation_scale((-3.0, 4.0), scheme)
        steps = (np.rint(x / np.float32(scale)) + zero).clip(low - (target == "tensorrt"), high) - zero
        scales = weight_scales(weight, largest).astype(np.float64)
        kernel = np.rint(weight / scales[:, None])
        want = np.einsum("oc,bchw->bohw", kernel, steps) * (scale * scales).reshape(1, -1, 1, 1)
        (got,) = run(result.SerializeToString(), {"x": x})
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_layers_have_names_and_blocks(model: onnx.ModelProto) -> None:
    found = layers(model)
    assert len(found) == len(nodes_of(model, "Conv")) > 40
    by_label = {layer.label: layer for layer in found}
    assert len(by_label) == len(found)
    assert by_label["head.1"].block == "head.1"
    assert {"context.lateral.0", "laterals.0", "fusions.2"} <= {layer.block for layer in found}
    stem = by_label["backbone.conv_stem"]
    assert stem.data != stem.result


def test_what_tensorrt_gets(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]]) -> None:
    result = quantized(model, ranges, "tensorrt")
    onnx.checker.check_model(result, full_check=True)
    stored = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
    zeros = [stored[node.input[2]] for op in ("QuantizeLinear", "DequantizeLinear") for node in nodes_of(result, op)]
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    quantizers, readers = nodes_of(result, "QuantizeLinear"), nodes_of(result, "DequantizeLinear")
    convolutions = nodes_of(result, "Conv")
    assert len(readers) == len(quantizers) + len(convolutions)  # one for each tensor, one for each weight
    made = {node.output[0] for node in readers}
    for node in convolutions:
        assert {node.input[0], node.input[1]} <= made
        assert len(node.input) < 3 or stored[node.input[2]].dtype == np.float32  # the bias
    consumers = {node.op_type for node in result.graph.node if made.intersection(node.input)}
    assert consumers == {"Conv"}


def test_a_float16_form_has_the_same_numbers(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]]) -> None:
    whole = quantized(model, ranges, "tensorrt")
    half = to_fp16(whole)
    onnx.checker.check_model(half, full_check=True)
    types = value_types(half)
    assert all(types[node.output[0]] == TensorProto.FLOAT16 for node in nodes_of(half, "Conv"))
    numbers = [
        {t.name: numpy_helper.to_array(t) for t in m.graph.initializer if t.data_type == 3} for m in (whole, half)
    ]
    assert numbers[0].keys() == numbers[1].keys()
    scales = {node.input[1] for node in nodes_of(whole, "DequantizeLinear")}
    stored = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (whole, half)]
    for name in scales:
        np.testing.assert_array_equal(stored[0][name], stored[1][f"{name}.fp16"].astype(np.float32))


def test_onnxruntime_computes_integers(
    model: onnx.ModelProto, ranges: dict[str, tuple[float, float]], tmp_path: Path, need
) -> None:
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4
    onnxruntime.InferenceSession(quantized(model, ranges, "onnxruntime").SerializeToString(), options)
    optimized = onnx.load(tmp_path / "optimized.onnx")
    integer = len(nodes_of(optimized, "QLinearConv"))
    assert integer == len(layers(model))
    assert not nodes_of(optimized, "Conv")


def test_openvino_computes_integers(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]], need) -> None:
    need("openvino")
    import openvino

    core = openvino.Core()
    source = core.read_model(quantized(model, ranges, "openvino").SerializeToString())
    compiled = core.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    kinds = [
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in compiled.get_runtime_model().get_ops()
        if "Convolution" in node.get_rt_info()["layerType"].astype(str)
    ]
    assert len(kinds) == len(layers(model))
    integer = sum(kind in ("i8", "u8") for kind in kinds)
    assert integer > 0.5 * len(kinds)  # which depthwise ones are quicker in float depends on the processor


def test_classes_hardly_change(
    backend: str,
    model: onnx.ModelProto,
    ranges: dict[str, tuple[float, float]],
    images: list[np.ndarray],
    tmp_path: Path,
) -> None:
    def masks(graph: onnx.ModelProto, **facts: str) -> np.ndarray:
        spec = SPEC.replace(precision="int8" if facts else "fp32", provenance=facts)
        save_graph(graph, tmp_path / "model.onnx", spec)
        with open_engine(Artifact("tiny", spec, {"onnx": tmp_path / "model.onnx"}), backend) as engine:  # type: ignore[attr-defined]
            return np.stack([engine.run({"image": image})["mask"] for image in images])

    want = masks(model)
    for target in SCHEMES:
        got = masks(quantized(model, ranges, target), target=target)
        assert (got == want).mean() > 0.95  # a tiny network; the shipped one keeps above 0.99


def test_only_what_is_named_is_quantized(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]]) -> None:
    chosen = layers(model)[3:5]
    result = insert_qdq(model, ranges, [layer.name for layer in chosen], SCHEMES["tensorrt"])
    made = {node.output[0] for node in nodes_of(result, "DequantizeLinear")}
    assert {n.name for n in nodes_of(result, "Conv") if n.input[1] in made} == {layer.name for layer in chosen}
    untouched = insert_qdq(model, ranges, [], SCHEMES["onnxruntime"])
    assert untouched.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_seven_bits(model: onnx.ModelProto, ranges: dict[str, tuple[float, float]]) -> None:
    names = [layer.name for layer in layers(model)]
    result = insert_qdq(model, ranges, names, SCHEMES["onnxruntime"], weight_bits=7)
    numbers = [numpy_helper.to_array(t) for t in result.graph.initializer if t.name.endswith("weight.q")]
    assert max(int(np.abs(n.astype(int)).max()) for n in numbers) == 63
    with pytest.raises(ConfigError, match="expected 7 or 8"):
        insert_qdq(model, ranges, names, SCHEMES["onnxruntime"], weight_bits=4)


def test_errors_name_the_culprit() -> None:
    model = plain_graph(outlier_graph((8, 12)))
    with pytest.raises(ConfigError, match="no convolution is called 'other'"):
        insert_qdq(model, {}, ["other"], SCHEMES["openvino"])
    with pytest.raises(InputError, match="no usable range for the tensor 'rgb'"):
        insert_qdq(model, {"rgb": (0.0, float("nan"))}, ["conv_safe"], SCHEMES["openvino"])


def test_sums_of_integers_are_no_activations() -> None:
    """Graphs of open size add up sizes."""
    model = outlier_graph((8, 12))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one"))
    model.graph.node.insert(1, helper.make_node("Shape", ["image"], ["sizes"], name="sizes", start=1, end=2))
    model.graph.node.insert(2, helper.make_node("Add", ["sizes", "one"], ["more"], name="more"))
    assert calibrated_tensors(model) == ["rgb", "four", "three"]
