"""The Segmenter: sizes, fits, colour order, confidence, threads, and what it says about wrong input.

Most tests run the colour model (each pixel's class is its strongest colour), so every expected pixel follows from the
picture itself.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from colour_graph import CLASSES, write_colour_model

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import EngineOptions
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.segmenter import Segmenter

RED, GREEN, BLUE = range(3)
BGR = np.array([(0, 0, 200), (0, 150, 0), (100, 0, 0)], np.uint8)  # of red, green, blue


def picture(ids: np.ndarray) -> Image:
    """The image whose strongest colours are these class ids."""
    return BGR[ids]


@pytest.fixture(params=["onnxruntime", "openvino"])
def backend(request: pytest.FixtureRequest, need) -> str:
    need(request.param)
    return str(request.param)


@pytest.mark.parametrize("channel_order", ["bgr", "rgb"])
def test_predict_takes_bgr_whatever_the_model_takes(tmp_path: Path, backend: str, channel_order: str) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (8, 12))
    model = write_colour_model(tmp_path / "model.onnx", channel_order=channel_order)
    with Segmenter.open(model, backend=backend) as segmenter:
        result = segmenter.predict(picture(ids))
    assert (result.mask.dtype, result.classes) == (np.uint8, CLASSES)
    np.testing.assert_array_equal(result.mask, ids)


def test_confidence_where_the_model_gives_it(tmp_path: Path, backend: str) -> None:
    ids = np.random.default_rng(0).integers(0, 3, (8, 12))
    with Segmenter.open(write_colour_model(tmp_path / "a.onnx", confidence=True), backend=backend) as segmenter:
        assert segmenter.outputs == ("mask", "confidence")
        confidence = segmenter.predict(picture(ids)).confidence
        assert confidence is not None
        np.testing.assert_array_equal(confidence, np.array([200, 150, 100])[ids])
        larger = segmenter.predict(picture(ids.repeat(2, 0).repeat(2, 1))).confidence
        assert larger is not None
        assert larger.shape == (16, 24)
    with Segmenter.open(write_colour_model(tmp_path / "b.onnx"), backend=backend) as segmenter:
        assert segmenter.predict(picture(ids)).confidence is None


@pytest.mark.parametrize("scale", [1, 2, 3, 10])
def test_stretch_returns_each_pixel_to_its_place(tmp_path: Path, scale: int) -> None:
    halves = np.full((8, 12), RED)
    halves[:, 6:], halves[4:, :] = GREEN, BLUE
    image = picture(halves.repeat(scale, 0).repeat(scale, 1))
    with Segmenter.open(write_colour_model(tmp_path / "model.onnx"), backend="onnxruntime") as segmenter:
        np.testing.assert_array_equal(segmenter.predict(image).mask, halves.repeat(scale, 0).repeat(scale, 1))


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (7, 13), (1080, 1920)])
@pytest.mark.parametrize("fit", ["stretch", "letterbox"])
def test_any_image_size(tmp_path: Path, size: tuple[int, int], fit: str) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    with Segmenter.open(model, backend="onnxruntime", fit=fit) as segmenter:
        mask = segmenter.predict(picture(np.full(size, GREEN))).mask
    assert mask.shape == size
    # letterbox bars are of the mean colour, which is blue here: none of them may come back
    assert (mask == GREEN).all()


def test_letterbox_keeps_the_shape_and_fills_with_the_mean(tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "model.onnx", size=(8, 12))
    with Segmenter.open(model, backend="onnxruntime", fit="letterbox") as segmenter:
        prepared = segmenter.prepare(
            picture(np.full((20, 10), RED))
        )  # comes down to 8x4, four columns of bar each side
        raw = segmenter.infer(prepared)
        result = segmenter.finish(raw, (20, 10))
    assert prepared.shape == (1, 8, 12, 3)
    np.testing.assert_array_equal(raw["mask"][0][:, 4:8], RED)
    np.testing.assert_array_equal(prepared[0][:, [0, 3, 8, 11]], np.broadcast_to([250, 20, 10], (8, 4, 3)))  # BGR
    assert (result.mask.shape, set(result.mask.ravel())) == ((20, 10), {RED})


def test_a_dynamic_model_takes_the_image_as_it_is_or_a_forced_size(tmp_path: Path, backend: str) -> None:
    model = write_colour_model(tmp_path / "model.onnx", dynamic=True)
    ids = np.random.default_rng(0).integers(0, 3, (31, 47))
    with Segmenter.open(model, backend=backend) as segmenter:
        assert segmenter.size is None
        assert segmenter.prepare(picture(ids)).shape == (1, 31, 47, 3)
        np.testing.assert_array_equal(segmenter.predict(picture(ids)).mask, ids)
    with Segmenter.open(model, backend=backend, size=(16, 20)) as segmenter:
        assert segmenter.size == (16, 20)
        assert segmenter.prepare(picture(ids)).shape == (1, 16, 20, 3)
        assert segmenter.predict(picture(ids)).mask.shape == (31, 47)


def test_a_fixed_model_refuses_another_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fixed to 8x12 and can't run at 16x24"):
        Segmenter.open(write_colour_model(tmp_path / "model.onnx"), backend="onnxruntime", size=(16, 24))


def test_the_steps_are_predict(tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    with Segmenter.open(write_colour_model(tmp_path / "model.onnx"), backend="onnxruntime") as segmenter:
        whole = segmenter.predict(image)
        steps = segmenter.finish(segmenter.infer(segmenter.prepare(image)), image.shape[:2])
    np.testing.assert_array_equal(whole.mask, steps.mask)
    assert set(whole.timings) == {"prepare", "infer", "finish"}
    assert all(milliseconds > 0 for milliseconds in whole.timings.values())
    assert steps.timings == {}


def test_views_of_arrays_are_taken_and_left_alone(tmp_path: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    with Segmenter.open(write_colour_model(tmp_path / "model.onnx"), backend="onnxruntime") as segmenter:
        for view in (image[::-1], image[:, ::-1], image[::2, ::3], image.transpose(1, 0, 2)):
            before = view.copy()
            view.setflags(write=False)
            mask = segmenter.predict(view).mask
            np.testing.assert_array_equal(mask, segmenter.predict(before).mask)
            np.testing.assert_array_equal(view, before)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 12, 3), np.float32), "got float32 8x12x3"),
        (np.zeros((8, 12), np.uint8), "got uint8 8x12"),
        (np.zeros((8, 12, 4), np.uint8), "got uint8 8x12x4"),
        (np.zeros((1, 8, 12, 3), np.uint8), "got uint8 1x8x12x3"),
        (np.zeros((0, 12, 3), np.uint8), "got uint8 0x12x3"),
        (np.uint8(3), "got a uint8"),
        ("frame.png", "got a str"),
        (None, "got a NoneType"),
    ],
)
def test_wrong_images_are_refused(tmp_path: Path, image: object, said: str) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    with Segmenter.open(model, backend="onnxruntime") as segmenter, pytest.raises(InputError) as caught:
        segmenter.predict(image)  # type: ignore[arg-type]
    assert str(caught.value) == f"{said}; expected a numpy array, uint8 HxWx3 (BGR)"


def test_threads_give_the_sequential_masks(tiny_onnx: Path, scenes: Path, backend: str) -> None:
    from ddsm_deploy.images import read_image

    images = [read_image(path) for path in sorted((scenes / "images").glob("*.png"))[:6]]
    with Segmenter.open(tiny_onnx, backend=backend) as segmenter:
        sequential = [segmenter.predict(image).mask for image in images]
        with ThreadPoolExecutor(8) as pool:
            threaded = list(pool.map(lambda index: segmenter.predict(images[index % 6]).mask, range(24)))
    for index, mask in enumerate(threaded):
        np.testing.assert_array_equal(mask, sequential[index % 6])
    assert any((mask != sequential[0]).any() for mask in sequential)


def test_torch_runs_a_checkpoint_at_a_forced_size(tiny_checkpoint: Path) -> None:
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    with Segmenter.open(tiny_checkpoint, backend="torch", size=(32, 64)) as segmenter:
        assert segmenter.size == (32, 64)
        assert segmenter.predict(image).mask.shape == (90, 120)
    options = EngineOptions(outputs=("mask", "confidence"))
    with Segmenter.open(tiny_checkpoint, backend="torch", options=options) as segmenter:
        confidence = segmenter.predict(image).confidence
        assert confidence is not None
        assert confidence.min() >= 255 // len(segmenter.spec.classes)  # the best of K classes has at least 1/K


# ---- the automatic choice


def test_auto_opens_something_and_says_why(tmp_path: Path, need) -> None:
    for name in ("onnxruntime", "openvino"):
        need(name)
    with Segmenter.open(write_colour_model(tmp_path / "model.onnx")) as segmenter:
        chosen, *others = segmenter.choice.split("; ")
        assert segmenter.backend in ("onnxruntime", "openvino")
        assert chosen.startswith(f"{segmenter.backend} {segmenter.precision} (")
        other = ({"onnxruntime", "openvino"} - {segmenter.backend}).pop()
        assert any(text.startswith(f"{other} fp32 ") and text.endswith(" ms)") for text in others)
        assert segmenter.options is not None
        assert segmenter.options.precision == segmenter.precision


def test_auto_takes_what_can_do_it_and_names_the_others(tmp_path: Path, need) -> None:
    for name in ("onnxruntime", "openvino"):
        need(name)
    model = write_colour_model(tmp_path / "model.onnx")
    with Segmenter.open(model, precision="fp32", options=EngineOptions(hint="throughput")) as segmenter:
        assert segmenter.backend == "openvino"
        assert "openvino fp32, the only one that can run this" in segmenter.choice
        assert "onnxruntime has no option 'hint'" in segmenter.choice
        assert "torch needs" not in segmenter.choice
    with pytest.raises(BackendError, match="no backend can run model: ") as caught:
        Segmenter.open(model, precision="int8")
    assert all(name in str(caught.value) for name in ("torch", "onnxruntime", "openvino"))


def test_auto_comes_down_to_torch_for_a_checkpoint(tiny_checkpoint: Path) -> None:
    with Segmenter.open(tiny_checkpoint) as segmenter:
        assert segmenter.backend == "torch"
        assert "onnxruntime needs the model's onnx file" in segmenter.choice


def test_auto_does_not_try_torch_beside_the_others(tiny_checkpoint: Path, tiny_onnx: Path) -> None:
    both = Artifact("tiny", resolve(tiny_onnx).spec, {"onnx": tiny_onnx, "checkpoint": tiny_checkpoint})
    with Segmenter.open(both) as segmenter:
        assert segmenter.backend != "torch"
        assert "torch not tried" in segmenter.choice


def test_what_was_asked_for_runs_or_it_is_an_error(tmp_path: Path, backend: str) -> None:
    model = write_colour_model(tmp_path / "model.onnx")
    with Segmenter.open(model, backend=backend, precision="fp32", threads=1) as segmenter:
        assert (segmenter.backend, segmenter.precision) == (backend, "fp32")
        assert segmenter.choice == f"{backend}, as asked for"
    with pytest.raises(BackendError):
        Segmenter.open(model, backend=backend, precision="int8")
    with pytest.raises(ConfigError, match="backend is 'tflite'"):
        Segmenter.open(model, backend="tflite")
    with pytest.raises(ConfigError, match="fit is 'crop'"):
        Segmenter.open(model, backend=backend, fit="crop")
    with pytest.raises(ConfigError, match="threads is 0"):
        Segmenter.open(model, backend=backend, threads=0)


def test_a_damaged_model_is_refused_before_any_runtime_sees_it(tmp_path: Path) -> None:
    path = write_colour_model(tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="damaged or cut short"):
        Segmenter.open(path)


def test_closed_is_closed(tmp_path: Path, backend: str) -> None:
    segmenter = Segmenter.open(write_colour_model(tmp_path / "model.onnx"), backend=backend)
    segmenter.close()
    segmenter.close()
    with pytest.raises(BackendError, match="is closed"):
        segmenter.predict(picture(np.full((8, 12), RED)))
    threads = threading.active_count()
    with pytest.raises(BackendError, match="is closed"):
        segmenter.submit(picture(np.full((8, 12), RED)))
    assert threading.active_count() == threads
