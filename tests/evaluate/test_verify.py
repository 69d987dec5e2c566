"""`verify` on real runtimes: right pairs pass, mistakes made on purpose are refused, and every figure is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken_graphs import quantized, swapped_axes, wrong_normalisation
from colour_data import COUNT, expected_iou, random_map, write_classes, write_colour_data, write_pair
from colour_graph import write_colour_model
from onnx import TensorProto, helper

from ddsm_deploy import kernels
from ddsm_deploy.datasets import open_dataset
from ddsm_deploy.engines import available_precisions
from ddsm_deploy.errors import ArtifactError, BackendError, ConfigError, InputError
from ddsm_deploy.evaluate.layers import LayersOptions
from ddsm_deploy.evaluate.verify import MAX_CHANGED, VerifyOptions, find_frames, verify
from ddsm_deploy.onnxfile import read_spec
from ddsm_deploy.spec import METADATA_KEY, PRECISIONS

FRAMES = Path(__file__).parents[2] / "examples" / "frames"
SIZE = (64, 96)
FUSED = " fused" if kernels.status().available else ""
"""What is said of a run that samples on the kernels wherever there are any."""


@pytest.fixture(scope="module")
def shipped(shipped_model: Path) -> Path:
    return shipped_model / "model.onnx"


@pytest.fixture(scope="module")
def made(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("swapped")`: the shipped model after one piece of surgery, made once."""
    folder = tmp_path_factory.mktemp("surgery")
    surgery: dict[str, Callable[[Path, Path], Path]] = {
        "swapped grid axes": swapped_axes,
        "wrong normalisation": wrong_normalisation,
        "uint8": quantized,
        "uint8 read as int8": lambda source, path: quantized(source, path, kind=TensorProto.INT8),
    }

    def make(name: str) -> Path:
        path = folder / f"{name.replace(' ', '-')}.onnx"
        return path if path.exists() else surgery[name](shipped, path)

    return make


def test_two_runtimes_agree_on_the_shipped_model(shipped: Path, need) -> None:
    need("openvino")
    result = verify(shipped, None, VerifyOptions(data=FRAMES, images=2, backend_b="openvino"))
    assert result, result.failures
    assert result.budget.changed == 0.1
    assert (result.images, result.pixels) == (2, 2 * 360 * 480)
    written = read_spec(shipped).provenance["sampling"]
    words = FUSED if written == "fused" else ""
    assert (result.a, result.b) == (f"model.onnx on onnxruntime fp32{words}", f"model.onnx on openvino fp32{words}")
    assert result.miou_a is result.max_logit_error is None  # neither labels nor logits


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_ways_of_sampling_agree(tiny_fused: Path, scenes: Path, backend: str, need, missing) -> None:
    need(backend)
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    sides = VerifyOptions(
        data=scenes / "images",
        images=4,
        backend_a=backend,
        backend_b=backend,
        sampling_a="portable",
        sampling_b="fused",
    )
    result = verify(tiny_fused, None, sides)
    assert result, result.failures
    words = f"{tiny_fused.name} on {backend} fp32"
    assert (result.a, result.b, result.budget.changed) == (words, f"{words} fused", 0.1)
    with pytest.raises(ConfigError, match=r"one and the same, .* fused, .*--sampling-b"):
        verify(tiny_fused, None, VerifyOptions(data=scenes / "images", backend_a=backend, backend_b=backend))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("mistake", ["swapped grid axes", "wrong normalisation", "uint8 read as int8"])
def test_a_broken_graph_is_refused(mistake: str, backend: str, shipped: Path, made, need) -> None:
    need(backend)
    result = verify(shipped, made(mistake), VerifyOptions(data=FRAMES, images=1, backend_b=backend))
    assert not result
    assert result.changed > 1.5
    (failure,) = result.failures
    assert failure.endswith(f"expected at most {5 if 'int8' in mistake else 0.1} %")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_quantization_read_rightly_passes(backend: str, shipped: Path, made, need) -> None:
    need(backend)
    result = verify(shipped, made("uint8"), VerifyOptions(data=FRAMES, images=1, backend_b=backend))
    assert result, result.failures
    assert result.budget.changed == 5
    assert 0 < result.changed < 5  # it is another function after all


def test_the_layer_where_a_misread_quantization_starts_is_found(shipped: Path, made, need) -> None:
    """The floor for INT8 is high, so that a right file stays below it: the layer named may lie a few behind."""
    need("onnxruntime")
    options = VerifyOptions(data=FRAMES, images=1, layers=LayersOptions())
    right, wrong = (verify(shipped, made(name), options).layers for name in ("uint8", "uint8 read as int8"))
    assert right is not None and right.first is None
    assert wrong is not None and wrong.first is not None
    convolutions = [node.name for node in onnx.load(shipped).graph.node if node.op_type == "Conv"]
    assert wrong.first.node in convolutions[:8]


def test_every_precision_has_a_budget() -> None:
    assert MAX_CHANGED.keys() == set(PRECISIONS)
    options = VerifyOptions(data=FRAMES)
    assert options.budget("fp32", "fp32").changed < options.budget("fp32", "bf16").changed
    assert options.budget("bf16", "int8").changed == options.budget("int8", "fp32").changed == 5
    assert VerifyOptions(data=FRAMES, max_changed=0.25).budget("fp32", "int8").changed == 0.25


# ---------------------------------------------------------------- a model and data whose every answer is known


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives each pixel the class of its strongest colour."""
    return write_colour_model(tmp_path_factory.mktemp("colours") / "right.onnx", size=SIZE)


@pytest.fixture(scope="module")
def mirrored(colours: Path) -> Path:
    """The same with its channels the wrong way round: red and blue trade places."""
    path = write_colour_model(colours.with_name("mirrored.onnx"), size=SIZE, channel_order="rgb")
    model = onnx.load(path)
    helper.set_model_props(model, {METADATA_KEY: read_spec(colours).to_json()})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_data(tmp_path_factory.mktemp("data"))


def test_every_figure(colours: Path, mirrored: Path, data: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    options = VerifyOptions(data=data, dataset="folder", max_miou_drop=1)
    result = verify(colours, mirrored, options, progress=lambda *step: steps.append(step))
    seen = np.stack([random_map(index) for index in range(COUNT)])
    red, green, blue = ((seen == identity).sum() for identity in range(3))
    assert result.changed == pytest.approx(100 * (red + blue) / seen.size)
    assert result.confusion.tolist() == [[0, 0, red], [0, green, 0], [blue, 0, 0]]
    assert {**result.changed_per_class} == {"red": 100, "green": 0, "blue": 100}
    assert result.miou_a == pytest.approx(np.mean(expected_iou(data)))
    assert result.miou_b is not None
    assert result.miou_b < result.miou_a - 1
    assert [failure.split()[0] for failure in result.failures] == [f"{result.changed:.3g}", "mIoU"]
    share = {f"images/{i}.png": 100 * float((seen[i] != 1).mean()) for i in range(COUNT)}
    assert {**dict(result.worst)} == pytest.approx({n: share[n] for n, _ in result.worst})
    assert len(result.worst) == 4
    assert min(dict(result.worst).values()) >= min(share.values())
    assert steps == [("frames", done, COUNT) for done in range(1, COUNT + 1)]
    fields = json.loads(result.to_json())
    assert (fields["a"], fields["passed"], fields["layers"]) == ("right.onnx on onnxruntime fp32", False, None)


def test_labels_are_matched_by_name_and_masks_brought_to_their_size(
    colours: Path, mirrored: Path, tmp_path: Path
) -> None:
    truth = np.kron(random_map(3), np.ones((2, 2), np.uint8))  # twice the network's size: halving loses nothing
    order = np.array([1, 2, 0], np.uint8)  # red, green, blue are 1, 2, 0 in the data set
    write_pair(tmp_path, "a", truth, order[truth])
    write_classes(tmp_path, ("blue", "red", "green"), (0, 1, 2))
    result = verify(colours, mirrored, VerifyOptions(data=tmp_path, dataset="folder", max_changed=100))
    assert (result.miou_a, result.pixels) == (100, truth.size)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_model_of_any_size_runs_at_the_other_s(backend: str, colours: Path, tmp_path: Path, need) -> None:
    need(backend)
    write_pair(tmp_path, "a", random_map(5, (128, 200)), random_map(5, (128, 200)))
    free = write_colour_model(tmp_path / "free.onnx", size=SIZE, dynamic=True)
    for pair in ((free, colours), (colours, free)):
        assert verify(*pair, VerifyOptions(data=tmp_path, backend_b=backend)).changed == 0


def test_a_precision_alone_finds_the_backend_that_has_it(colours: Path, data: Path, missing, need) -> None:
    need("openvino")
    if "bf16" not in available_precisions("openvino"):
        missing("bf16", "this CPU has none")
    result = verify(colours, None, VerifyOptions(data=data / "images", images=1, precision_b="bf16"))
    assert (result.b, result.budget.changed, result.changed) == ("right.onnx on openvino bf16", 1, 0)


# ---------------------------------------------------------------- a network


def with_logits(source: Path, path: Path, *, value: float | None = None) -> Path:
    """The deployed file with its logits as an output, of which one may be replaced."""
    model = onnx.load(source)
    argmax = next(node for node in model.graph.node if node.op_type == "ArgMax")
    add = np.zeros((1, 1, 1, SIZE[1]), np.float32)
    if value is not None:
        add[..., 7] = value
    model.graph.initializer.append(onnx.numpy_helper.from_array(add, "add"))
    model.graph.node.append(helper.make_node("Add", [argmax.input[0], "add"], ["logits"]))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, None, *SIZE]))
    onnx.save(model, path)
    return path


def test_torch_and_its_file(tiny_checkpoint: Path, tiny_onnx: Path, scenes: Path, tmp_path: Path) -> None:
    file = with_logits(tiny_onnx, tmp_path / "logits.onnx")
    options = VerifyOptions(data=scenes, dataset="folder", images=3, max_miou_drop=0.1, max_logit_error=1e-2)
    result = verify(tiny_checkpoint, file, options)
    assert result, result.failures
    assert (result.a, result.b) == (f"tiny.safetensors on torch fp32{FUSED}", "logits.onnx on onnxruntime fp32")
    assert result.max_logit_error is not None
    assert result.mean_logit_error is not None
    assert 0 < result.mean_logit_error < result.max_logit_error < 1e-2
    assert result.miou_a == pytest.approx(result.miou_b, abs=0.1)


@pytest.mark.parametrize(
    ("value", "words"), [(float("nan"), "logits are NaN or infinite"), (0.5, "a logit is off by 0.5")]
)
def test_wrong_logits_behind_equal_masks(
    value: float, words: str, tiny_onnx: Path, scenes: Path, tmp_path: Path
) -> None:
    right = with_logits(tiny_onnx, tmp_path / "right.onnx")
    wrong = with_logits(tiny_onnx, tmp_path / "wrong.onnx", value=value)
    result = verify(right, wrong, VerifyOptions(data=scenes / "images", images=1, max_logit_error=0.1))
    assert result.changed == 0
    assert words in result.failures[0]


def test_torch_runs_at_the_size_of_the_file(
    tiny_checkpoint: Path, tiny_onnx: Path, scenes: Path, tmp_path: Path
) -> None:
    from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint

    network, spec = load_checkpoint(tiny_checkpoint)
    larger = tmp_path / "larger.safetensors"
    save_checkpoint(larger, network, spec.replace(height=128, width=160))
    assert verify(tiny_onnx, larger, VerifyOptions(data=scenes / "images", images=1, backend_b="torch"))


# ---------------------------------------------------------------- what is compared on


def test_frames_are_evenly_spaced(data: Path) -> None:
    frames = find_frames(VerifyOptions(data=data, dataset="folder", images=3))
    dataset = open_dataset("folder", data, "val")
    assert frames.classes == dataset.classes.names
    assert [(frame.name, frame.path) for frame in frames] == [
        (f"images/{i}.png", data / "images" / f"{i}.png") for i in (0, 2, 4)
    ]
    for frame, index in zip(frames, (0, 2, 4), strict=True):
        assert frame.labels is not None
        np.testing.assert_array_equal(frame.labels(), dataset.labels(index))
    frames = find_frames(VerifyOptions(data=FRAMES, images=100))
    assert not frames.classes
    assert [frame.name for frame in frames] == [f"street_{i}.jpg" for i in range(6)]
    (frame,) = find_frames(VerifyOptions(data=FRAMES / "street_3.jpg"))
    assert frame.name == "street_3.jpg" and frame.labels is None


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"data": "nowhere"}, InputError, "nowhere: no such file or folder"),
        ({"data": "empty"}, InputError, "empty: no image there"),
        ({"data": "empty", "dataset": "folder"}, InputError, "classes.json: can't be read"),
        ({"data": "empty", "dataset": "voc"}, ConfigError, "data set kind is 'voc'"),
        ({}, ConfigError, "A and B are one and the same, right.onnx on onnxruntime fp32"),
        ({"backend_b": "tflite"}, ConfigError, "backend is 'tflite'"),
        ({"precision_b": "bf8"}, ConfigError, "precision is 'bf8'"),
        ({"precision_b": "bf16", "backend_b": "onnxruntime"}, BackendError, "onnxruntime runs .* at fp32"),
        ({"provider_b": "cuda", "backend_b": "openvino"}, ConfigError, "openvino has no option 'provider'"),
        ({"backend_b": "torch"}, ArtifactError, "has no checkpoint"),
        (
            {"max_logit_error": 1.0, "backend_b": "openvino"},
            ConfigError,
            "a limit for logits needs models that give them",
        ),
    ],
)
def test_what_can_not_be_compared(
    options: dict[str, str], error: type[Exception], words: str, colours: Path, tmp_path: Path, monkeypatch, need
) -> None:
    need("openvino")
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    write_pair(tmp_path / "some", "a", random_map(0), random_map(0))
    with pytest.raises(error, match=words):
        verify(colours, None, VerifyOptions(**{"data": Path("some"), **{k: _path(k, v) for k, v in options.items()}}))


def _path(key: str, value: str) -> str | Path:
    return Path(value) if key == "data" else value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": 0}, "images is 0"),
        ({"max_miou_drop": 1.0}, "needs labels"),
        ({"max_changed": -1.0}, "changed is -1.0"),
        ({"max_changed": float("nan")}, "changed is nan"),
        ({"picture": Path("worst.jpg")}, r"worst\.jpg: the picture is a PNG"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        VerifyOptions(data=FRAMES, **options)


def test_models_that_are_not_alike(colours: Path, tiny_onnx: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"models of other classes \(3 and 11; only A has red, green, blue; only B has sky"
    ):
        verify(colours, tiny_onnx, VerifyOptions(data=data / "images"))
    small = write_colour_model(tmp_path / "small.onnx", size=(32, 48))
    with pytest.raises(InputError, match="A runs at 64x96 and B at 32x48"):
        verify(colours, small, VerifyOptions(data=data / "images"))


def test_an_unreadable_frame_is_an_error_and_never_skipped(colours: Path, mirrored: Path, tmp_path: Path) -> None:
    write_pair(tmp_path, "a", random_map(0), random_map(0))
    (tmp_path / "images" / "b.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:-40])
    with pytest.raises(InputError, match=r"b\.png"):
        verify(colours, mirrored, VerifyOptions(data=tmp_path / "images", max_changed=100))
