"""The float16 form of a graph: what is in float16, what stays float32, and that it computes the same function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from sampling_calls import export as export_calls
from sampling_calls import inputs as call_inputs

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.export import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.export.fp16 import float_types, to_fp16
from ddsm_deploy.export.onnxgraph import value_types
from ddsm_deploy.images import read_image

Run = Callable[..., list[np.ndarray]]

OUTPUTS = ("mask", "logits", "confidence")


@pytest.fixture(scope="module")
def model(tiny_onnx: Path) -> onnx.ModelProto:
    return onnx.load(tiny_onnx)


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[np.ndarray]:
    frames = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:4]]
    return [cv2.resize(frame, (96, 64))[np.newaxis] for frame in frames]


def test_every_convolution_is_half(model: onnx.ModelProto) -> None:
    convolutions = sum(node.op_type == "Conv" for node in model.graph.node)
    counts = float_types(to_fp16(model))
    assert counts["Conv float16"] == convolutions > 40
    assert counts["Conv float32"] == 0
    weights = [t for t in to_fp16(model).graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in weights} == {TensorProto.FLOAT16}


def test_the_islands_stay_float(model: onnx.ModelProto) -> None:
    half = to_fp16(model)
    onnx.checker.check_model(half, full_check=True)
    types = value_types(half)
    by_op: dict[str, list[onnx.NodeProto]] = {}
    for node in half.graph.node:
        by_op.setdefault(node.op_type, []).append(node)
    for op in ("Softmax", "LayerNormalization"):
        assert by_op[op] and all(types[node.output[0]] == TensorProto.FLOAT for node in by_op[op])
    (decision,) = by_op["ArgMax"]
    assert types[decision.input[0]] == TensorProto.FLOAT
    upsampling = next(node for node in by_op["Resize"] if node.output[0] == decision.input[0])
    assert types[upsampling.output[0]] == TensorProto.FLOAT  # rounding behind it would make ties
    assert all(types[name] == TensorProto.FLOAT for node in by_op["GridSample"] for name in node.input)


def test_the_grid_is_an_option(model: onnx.ModelProto) -> None:
    half = to_fp16(model, grid="fp16")
    types = value_types(half)
    grids = [node for node in half.graph.node if node.op_type == "GridSample"]
    assert len(grids) == 6
    assert all(types[name] == TensorProto.FLOAT16 for node in grids for name in node.input)
    with pytest.raises(ConfigError, match="expected fp32 or fp16"):
        to_fp16(model, grid="fp8")


def test_masks_hardly_change(run: Run, model: onnx.ModelProto, images: list[np.ndarray]) -> None:
    """float16 has 11 bits: relative steps of 5e-4, so few pixels are near enough to a tie to change class."""
    whole = model.SerializeToString()
    for grid in ("fp32", "fp16"):
        half = to_fp16(model, grid=grid).SerializeToString()
        for image in images:
            (want,), (got,) = run(whole, {"image": image}), run(half, {"image": image})
            assert (got == want).mean() > 0.995


def test_positions_on_a_wide_map_stay_exact(run: Run) -> None:
    """Position 3000 has a step of 2 pixels in float16: computed in that, the sampled values would be others'."""
    case = (1, 2, 2, 4, 2, 3000, 2.0)
    feeds = {f"in{i}": tensor.numpy() for i, tensor in enumerate(call_inputs(case))}
    ramp = np.linspace(0, 8, 3000, dtype=np.float32)
    feeds["in2"] = np.broadcast_to(ramp, feeds["in2"].shape).copy()  # values that say where they were read
    for sampling in ("portable", "gather"):
        model = onnx.load_from_string(export_calls(sampling, [case], axes=()))
        half = to_fp16(model)
        (want,), (got,) = (run(m.SerializeToString(), feeds) for m in (model, half))
        inner = np.s_[..., 20:-20]
        # the step of float16 at 8 is 0.004; a position off by one pixel would add 0.003 for each
        assert np.abs(got - want)[inner].max() < 0.02


def test_other_outputs_keep_their_types(exported: Callable[..., ExportReport], run: Run) -> None:
    whole = exported("ddsm", dynamic="batch", outputs=OUTPUTS).path
    half = to_fp16(onnx.load(whole)).SerializeToString()
    batch = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), dtype=np.uint8)
    got, want = (run(model, {"image": batch}) for model in (half, whole))
    assert [a.dtype for a in got] == [np.uint8, np.float32, np.uint8]
    assert [a.shape for a in got] == [a.shape for a in want]
    assert np.abs(got[1] - want[1]).max() < 0.03 * np.abs(want[1]).max()


def test_export_writes_it(tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    report = export_onnx(tiny_checkpoint, tmp_path / "half.onnx", ExportOptions(precision="fp16"))
    assert report.spec.precision == "fp16"
    assert report.bytes < 0.65 * tiny_onnx.stat().st_size
    assert report.parity and report.parity.changed < 1
    facts = resolve(report.path).spec.provenance
    assert (facts["grid"], facts["weights"]) == ("fp32", "fp16")


def test_export_options_that_contradict() -> None:
    with pytest.raises(ConfigError, match="stores its weights as float16 anyway"):
        ExportOptions(precision="fp16", weights="fp16")
    with pytest.raises(ConfigError, match="in an fp16 graph alone"):
        ExportOptions(grid="fp16")
    with pytest.raises(ConfigError, match="precision is 'int8'"):
        ExportOptions(precision="int8")


def test_what_it_can_not_rewrite_is_refused(model: onnx.ModelProto) -> None:
    with pytest.raises(ArtifactError, match="holds float16 already"):
        to_fp16(to_fp16(model))
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])
    node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    looped = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("c", TensorProto.BOOL, []), helper.make_tensor_value_info("x", 1, [1])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        )
    )
    with pytest.raises(ArtifactError, match=r"control flow \(If 'choice'\)"):
        to_fp16(looped)


def test_huge_weights_are_clipped_not_infinite() -> None:
    weight = np.array([[1e6, -1e6], [1.0, 2.0]], np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    half = to_fp16(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9))
    (stored,) = (numpy_helper.to_array(t) for t in half.graph.initializer)
    assert stored.dtype == np.float16 and np.isfinite(stored).all()
    assert np.abs(stored).max() == np.finfo(np.float16).max


def test_torch_rounding_agrees(
    tiny_checkpoint: Path, model: onnx.ModelProto, images: list[np.ndarray], run: Run
) -> None:
    """The graph rounds where torch's own float16 does, or nearly: both change about the same few pixels."""
    with open_engine(resolve(tiny_checkpoint), "torch", EngineOptions(precision="fp16")) as engine:  # type: ignore[attr-defined]
        assert engine.precision == "fp16"
        half = to_fp16(model).SerializeToString()
        for image in images:
            assert (engine.run({"image": image})["mask"] == run(half, {"image": image})[0]).mean() > 0.99
    assert torch.get_autocast_dtype("cpu") == torch.bfloat16  # left as it was
