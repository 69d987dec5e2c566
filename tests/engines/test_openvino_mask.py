"""Resize, argmax and cast at a graph's end become one operator on our kernels: where, and with what result."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy import kernels
from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.images import Image, read_image


@pytest.fixture(scope="module", autouse=True)
def _openvino(need, missing) -> None:
    need("openvino")
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)


@pytest.fixture(scope="module")
def images(scenes: Path) -> list[Image]:
    frames = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:4]]
    return [cv2.resize(frame, (96, 64))[np.newaxis] for frame in frames]


def joined(model: Path, sampling: str = "fused", float_type: str = "fp32") -> bool:
    """Whether the model's end is put on the kernels."""
    from ddsm_deploy.engines.openvino_import import ov
    from ddsm_deploy.engines.openvino_mask import join_mask
    from ddsm_deploy.engines.openvino_reader import SamplingReader

    core, reader = ov.Core(), SamplingReader(sampling, float_type)
    core.add_extension(reader.extension())
    read = core.read_model(str(model))
    done = join_mask(read, reader, float_type)
    kinds = [node.get_type_name() for node in read.get_ordered_ops()]
    assert ("TopK" in kinds) == (not done)
    assert read.outputs[0].get_names() == {"mask"}
    return done


def test_masks_are_those_of_standard_operators(tiny_fused: Path, tiny_onnx: Path, images: list[Image]) -> None:
    assert joined(tiny_fused)
    assert joined(tiny_onnx)  # the end of a graph has nothing to do with how it samples
    with (
        open_engine(resolve(tiny_fused), "openvino") as ours,
        open_engine(resolve(tiny_fused), "openvino", EngineOptions(sampling="portable")) as theirs,
        open_engine(resolve(tiny_fused), "onnxruntime") as reference,
    ):
        for image in images:
            masks = [engine.run({"image": image})["mask"] for engine in (ours, theirs, reference)]
            assert len(np.unique(masks[0])) > 2
            assert (masks[0] != masks[1]).mean() < 1e-3
            assert (masks[0] != masks[2]).mean() < 1e-3


def test_bf16(tiny_fused: Path, images: list[Image], missing) -> None:
    from ddsm_deploy.engines.openvino import OpenVinoEngine

    if "bf16" not in OpenVinoEngine.precisions():
        missing("bf16", "this CPU has no bfloat16 arithmetic")
    assert joined(tiny_fused, float_type="bf16")
    with (
        open_engine(resolve(tiny_fused), "openvino", EngineOptions(precision="bf16")) as ours,
        open_engine(resolve(tiny_fused), "onnxruntime") as reference,
    ):
        for image in images:
            masks = [engine.run({"image": image})["mask"] for engine in (ours, reference)]
            assert (masks[0] != masks[1]).mean() < 0.02


def test_a_batch_of_any_size(tiny_checkpoint: Path, tmp_path: Path, images: list[Image]) -> None:
    from ddsm_deploy.export import ExportOptions, export_onnx

    path = tmp_path / "batch.onnx"
    export_onnx(tiny_checkpoint, path, ExportOptions(dynamic="batch", sampling="fused", verify=False))
    assert joined(path)
    with open_engine(resolve(path), "openvino") as engine:
        alone = [engine.run({"image": image})["mask"] for image in images]
        for count in (1, 4, 2):
            together = engine.run({"image": np.concatenate(images[:count])})["mask"]
            np.testing.assert_array_equal(together, np.concatenate(alone[:count]))


def test_what_wants_more_than_the_mask_keeps_its_logits(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from ddsm_deploy.export import ExportOptions, export_onnx

    path = tmp_path / "more.onnx"
    options = ExportOptions(outputs=("mask", "confidence"), sampling="fused", verify=False)
    export_onnx(tiny_checkpoint, path, options)
    assert not joined(path)


@pytest.mark.parametrize(
    ("change", "done"),
    [
        ({}, True),
        ({"mode": "nearest"}, False),
        ({"coordinate_transformation_mode": "align_corners"}, False),
        ({"coordinate_transformation_mode": "asymmetric"}, False),
        ({"axis": 3}, False),
        ({"to": "INT32"}, False),
        ({"classes": 257}, False),
        ({"also": True}, False),
    ],
    ids=str,
)
def test_only_this_end_is_taken(tmp_path: Path, change: dict[str, object], done: bool) -> None:
    assert joined(write_end(tmp_path / "end.onnx", **change)) == done


def write_end(
    path: Path,
    *,
    mode: str = "linear",
    coordinate_transformation_mode: str = "half_pixel",
    axis: int = 1,
    to: str = "UINT8",
    classes: int = 5,
    also: bool = False,
) -> Path:
    """A graph of nothing but such an end; `also` lets something else read the resized logits."""
    import onnx
    from onnx import TensorProto, helper

    resized = [1, classes, 8, 12]
    size = helper.make_tensor("size", TensorProto.INT64, [4], resized)
    nodes = [
        helper.make_node(
            "Resize", ["logits", "", "", "size"], ["large"], mode=mode,
            coordinate_transformation_mode=coordinate_transformation_mode,
        ),
        helper.make_node("ArgMax", ["large"], ["class"], axis=axis, keepdims=0),
        helper.make_node("Cast", ["class"], ["mask"], to=getattr(TensorProto, to)),
    ]  # fmt: skip
    shape = [length for index, length in enumerate(resized) if index != axis]
    outputs = [helper.make_tensor_value_info("mask", getattr(TensorProto, to), shape)]
    if also:
        nodes.append(helper.make_node("Exp", ["large"], ["more"]))
        outputs.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, resized))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes, 4, 6])
    graph = helper.make_graph(nodes, "end", [logits], outputs, [size])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
