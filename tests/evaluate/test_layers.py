"""Where two runs part, on real runtimes: mistakes made at a known node are found at that node."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_graphs import swapped_axes, wrong_normalisation
from colour_graph import write_colour_model

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.evaluate.layers import NOISE_FLOORS, Layer, LayersOptions, LayersResult, compare_layers
from ddsm_deploy.evaluate.verify import VerifyOptions, verify
from ddsm_deploy.images import Image, read_image
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import PRECISIONS


@pytest.fixture(scope="module")
def image(scenes: Path) -> Image:
    return read_image(sorted((scenes / "images").iterdir())[0])


@pytest.fixture(scope="module")
def reference(tiny_onnx: Path) -> Iterator[Segmenter]:
    with Segmenter.open(tiny_onnx, backend="onnxruntime", warm_up=False) as segmenter:
        yield segmenter


def nodes(path: Path, op_type: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path).graph.node if node.op_type == op_type]


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest, need) -> str:
    need(request.param)
    return request.param


def compared(reference: Segmenter, file: Path, backend: str, image: Image, **options: object) -> LayersResult:
    with Segmenter.open(file, backend=backend, warm_up=False) as other:
        return compare_layers(reference, other, [("frame", image)], LayersOptions(**options))


def test_swapped_axes_are_found_at_the_first_grid_sample(
    reference: Segmenter, tiny_onnx: Path, backend: str, image: Image, tmp_path: Path
) -> None:
    result = compared(reference, swapped_axes(tiny_onnx, tmp_path / "swapped.onnx"), backend, image)
    assert not result
    assert result.first is not None
    sample = nodes(tiny_onnx, "GridSample")[0]
    assert (result.first.op_type, result.first.tensor) == ("GridSample", sample.output[0])
    assert result.first.error > 0.05
    assert result.first.error_before < 1e-4
    assert result.first in result.jumps(5)
    assert f"the runs part at {result.first.node} (GridSample)" in result.sentence()


def test_a_wrong_normalisation_is_found_at_its_node(
    reference: Segmenter, tiny_onnx: Path, backend: str, image: Image, tmp_path: Path
) -> None:
    result = compared(reference, wrong_normalisation(tiny_onnx, tmp_path / "scaled.onnx"), backend, image)
    assert result.first is not None
    assert result.first.tensor == nodes(tiny_onnx, "Sub")[0].output[0]
    assert result.first.error_before == 0


def test_a_fused_node_is_a_layer(
    reference: Segmenter, tiny_onnx: Path, tiny_fused: Path, backend: str, image: Image, tmp_path: Path
) -> None:
    result = compared(reference, tiny_fused, backend, image)
    assert result, result.sentence()
    model = onnx.load(tiny_fused)
    calls = [node for node in model.graph.node if node.op_type == "DynamicSampleAttention"]
    assert {node.output[0] for node in calls} <= {layer.tensor for layer in result.layers}

    calls[2].input[0], calls[2].input[1] = calls[2].input[1], calls[2].input[0]  # query for key
    onnx.save(model, tmp_path / "swapped.onnx")
    result = compared(reference, tmp_path / "swapped.onnx", backend, image)
    assert result.first is not None
    assert result.first.tensor == calls[2].output[0]
    assert result.first.error_before < 1e-4


def test_right_runs_stay_within_the_noise(reference: Segmenter, tiny_onnx: Path, image: Image, need) -> None:
    need("openvino")
    result = compared(reference, tiny_onnx, "openvino", image)
    assert result
    assert result.first is None
    assert result.noise_floor == NOISE_FLOORS["fp32"]
    assert result.frames == ("frame",)
    assert "no layer leaves the noise floor of 0.001" in result.sentence()
    # every convolution was seen, for this network has no other way from the image to the mask
    seen = {layer.tensor for layer in result.layers}
    assert {node.output[0] for node in nodes(tiny_onnx, "Conv")} <= seen
    strict = compared(reference, tiny_onnx, "openvino", image, noise_floor=1e-9)
    assert not strict


def test_pieces_change_nothing(reference: Segmenter, tiny_onnx: Path, image: Image, tmp_path: Path) -> None:
    file = swapped_axes(tiny_onnx, tmp_path / "swapped.onnx")
    whole = compared(reference, file, "onnxruntime", image)
    pieces = compared(reference, file, "onnxruntime", image, piece=1 << 18)
    assert [layer.tensor for layer in whole.layers] == [layer.tensor for layer in pieces.layers]
    assert whole.first is not None
    assert pieces.first is not None
    assert whole.first.tensor == pieces.first.tensor
    # what is watched is fused otherwise, so rounding differs from cut to cut
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.05, abs=1e-5)


def test_progress(reference: Segmenter, tiny_onnx: Path, image: Image, tmp_path: Path) -> None:
    file = swapped_axes(tiny_onnx, tmp_path / "swapped.onnx")
    steps: list[tuple[int, int]] = []
    with Segmenter.open(file, backend="onnxruntime", warm_up=False) as other:
        result = compare_layers(
            reference,
            other,
            [("one", image), ("two", np.ascontiguousarray(image[:, ::-1]))],
            LayersOptions(piece=1 << 19),
            progress=lambda *step: steps.append(step),
        )
    assert len(steps) > 1
    assert steps == sorted(set(steps))
    assert steps[-1] == (len(result.layers), len(result.layers))
    assert result.frames == ("one", "two")


def test_verify_looks_at_the_worst_frames(tiny_onnx: Path, scenes: Path, tmp_path: Path) -> None:
    file = swapped_axes(tiny_onnx, tmp_path / "swapped.onnx")
    options = VerifyOptions(data=scenes / "images", images=4, layers=LayersOptions(frames=2))
    result = verify(tiny_onnx, file, options)
    assert result.layers is not None
    assert result.layers.frames == tuple(name for name, _ in result.worst[:2])
    fields = json.loads(result.to_json())["layers"]
    assert result.layers.first is not None
    assert fields["first"] == result.layers.first.tensor
    assert len(fields["layers"]) == len(result.layers.layers)


def test_files_without_a_tensor_in_common(reference: Segmenter, image: Image, tmp_path: Path) -> None:
    other = write_colour_model(tmp_path / "colours.onnx", size=(64, 96))
    with pytest.raises(InputError, match=r"tiny\.onnx and colours\.onnx have no inner tensor of one name"):
        compared(reference, other, "onnxruntime", image)


def test_what_is_no_onnx_file_is_said_before_the_work(tiny_checkpoint: Path, tiny_onnx: Path, scenes: Path) -> None:
    options = VerifyOptions(data=scenes / "images", layers=LayersOptions())
    with pytest.raises(ConfigError, match=r"between ONNX files, and torch runs tiny\.safetensors"):
        verify(tiny_onnx, tiny_checkpoint, options)


def test_no_image(reference: Segmenter) -> None:
    with pytest.raises(ConfigError, match="no image"):
        compare_layers(reference, reference, [])


@pytest.mark.parametrize("options", [{"noise_floor": 0.0}, {"noise_floor": math.nan}, {"frames": 0}, {"piece": 0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options)).replace('_', ' ')} is"):
        LayersOptions(**options)


def test_numbers_that_are_not_finite_never_pass() -> None:
    broken = Layer(tensor="x", node="n", op_type="Div", error=math.inf, error_before=0.1)
    after = Layer(tensor="y", node="m", op_type="Add", error=math.inf, error_before=math.inf)
    result = LayersResult(layers=(broken, after), noise_floor=0.5, frames=("f",), unseen=1)
    assert not result
    assert result.first is broken
    assert result.jumps(1) == [broken]  # the one that only hands it on added nothing
    assert json.loads(json.dumps(result.fields(), allow_nan=False))["layers"][0]["error"] is None


def test_every_precision_has_a_noise_floor() -> None:
    assert NOISE_FLOORS.keys() == set(PRECISIONS)
