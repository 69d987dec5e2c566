"""`evaluate` against scores worked out by hand, on a model whose every answer is known, and on a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from colour_data import expected_iou, random_map, write_classes, write_colour_data, write_pair
from colour_graph import CLASSES, write_colour_model

from ddsm_deploy.datasets import IGNORE, open_dataset
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.evaluate.accuracy import evaluate
from ddsm_deploy.evaluate.metrics import BoundaryScore
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import sha256_of

SIZE = (64, 96)


@pytest.fixture(scope="module")
def colours(colour_onnx: Path) -> Iterator[Segmenter]:
    """A model that gives each pixel the class of its strongest colour: red, green or blue."""
    with Segmenter.open(colour_onnx, backend="onnxruntime") as segmenter:
        yield segmenter


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_colour_data(tmp_path / "data")


def test_scores(colours: Segmenter, colour_onnx: Path, data: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = evaluate(colours, open_dataset("folder", data, "val"), progress=lambda *step: steps.append(step))
    iou = expected_iou(data)
    assert [*result.per_class] == [*CLASSES]
    assert [*result.per_class.values()] == pytest.approx(iou)
    assert result.miou == pytest.approx(np.mean(iou))
    assert 20 < result.miou < 90  # neither right nor wrong everywhere, or this would prove little
    assert (result.images, result.pixels) == (5, 5 * 56 * 96)
    assert (result.backend, result.precision) == ("onnxruntime", "fp32")
    assert (result.dataset, result.split, result.model) == ("folder", "val", "colours")
    assert result.sha256 == sha256_of(colour_onnx)
    assert steps == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_boundary_score_at_the_tolerance_asked_for(colours: Segmenter, data: Path) -> None:
    dataset = open_dataset("folder", data, "val")
    for tolerance in (0, 2):
        result = evaluate(colours, dataset, boundary_tolerance=tolerance)
        score = BoundaryScore(3, tolerance=tolerance)
        for index in range(5):
            score.update(dataset.labels(index), random_map(index))
        assert result.boundary_tolerance_px == tolerance
        assert result.boundary_f == pytest.approx(100 * score.score())
        assert [*result.boundary_f_per_class.values()] == pytest.approx([*(100 * score.f_scores())])


def test_json(colours: Segmenter, tmp_path: Path) -> None:
    write_pair(tmp_path, "a", np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8))
    write_classes(tmp_path)
    fields = json.loads(evaluate(colours, open_dataset("folder", tmp_path, "val")).to_json())
    assert fields["miou"] == fields["pixel_accuracy"] == 100
    assert fields["boundary_f"] is None  # one class, so no boundary
    assert fields["per_class"] == {"red": 100, "green": None, "blue": None}
    assert fields["boundary_tolerance_px"] == 3
    assert {"backend", "precision", "model", "sha256", "dataset", "split", "images"} <= fields.keys()


def test_classes_are_matched_by_name(colours: Segmenter, data: Path) -> None:
    expected = evaluate(colours, open_dataset("folder", data, "val"))
    write_classes(data, ("blue", "red", "green"), (2, 0, 1))
    shuffled = evaluate(colours, open_dataset("folder", data, "val"))
    assert [*shuffled.per_class] == ["blue", "red", "green"]
    assert {**shuffled.per_class} == pytest.approx({**expected.per_class})
    assert shuffled.miou == pytest.approx(expected.miou)
    assert shuffled.boundary_f == pytest.approx(expected.boundary_f)


def test_labels_of_another_size_than_the_image(colours: Segmenter, data: Path) -> None:
    expected = evaluate(colours, open_dataset("folder", data, "val"))
    for path in (data / "labels").iterdir():
        labels = np.array(PIL.Image.open(path))
        PIL.Image.fromarray(np.kron(labels, np.ones((3, 2), dtype=np.uint8))).save(path)
    larger = evaluate(colours, open_dataset("folder", data, "val"))
    assert larger.pixels == 6 * expected.pixels
    assert {**larger.per_class} == pytest.approx({**expected.per_class})


def test_images_of_another_size_than_the_network(colours: Segmenter, tmp_path: Path) -> None:
    # blocks of 16 pixels at twice the network's size: halving and doubling loses nothing
    truth = np.kron(random_map(3), np.ones((2, 2), dtype=np.uint8))
    write_pair(tmp_path, "a", truth, truth)
    write_classes(tmp_path)
    result = evaluate(colours, open_dataset("folder", tmp_path, "val"))
    assert (result.miou, result.pixels) == (100, truth.size)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("red", "green", "sky"), "the model's 3 classes are not the data set's 3: only the model has blue; "),
        (("red", "green", "sky"), "only the data set has sky"),
        (("red", "green"), "only the model has blue; only the data set has none"),
        ((*CLASSES, *"abcdefgh"), "only the data set has a, b, c, d, e, f and 2 more"),
    ],
)
def test_other_classes(colours: Segmenter, data: Path, names: tuple[str, ...], words: str) -> None:
    write_classes(data, names)
    with pytest.raises(InputError) as caught:
        evaluate(colours, open_dataset("folder", data, "val"))
    assert words in str(caught.value)


@pytest.mark.parametrize("folder", ["images", "labels"])
@pytest.mark.parametrize("damage", [b"", b"no image", None])
def test_an_unreadable_file_is_an_error_and_never_skipped(
    colours: Segmenter, data: Path, folder: str, damage: bytes | None
) -> None:
    path = data / folder / "3.png"
    dataset = open_dataset("folder", data, "val")
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    with pytest.raises(InputError, match=str(path)):
        evaluate(colours, dataset)


def test_a_file_that_goes_away_meanwhile(colours: Segmenter, data: Path) -> None:
    dataset = open_dataset("folder", data, "val")
    (data / "images" / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.png"):
        evaluate(colours, dataset)


def test_nothing_but_void(colours: Segmenter, tmp_path: Path) -> None:
    write_pair(tmp_path, "a", random_map(0), np.full(SIZE, IGNORE, np.uint8))
    write_classes(tmp_path)
    with pytest.raises(InputError, match="no pixel of split 'val'"):
        evaluate(colours, open_dataset("folder", tmp_path, "val"))


def test_a_tolerance_out_of_range(colours: Segmenter, data: Path) -> None:
    with pytest.raises(ConfigError, match="boundary tolerance is 101 pixels"):
        evaluate(colours, open_dataset("folder", data, "val"), boundary_tolerance=101)


def test_a_model_of_the_other_channel_order_scores_the_same(data: Path, tmp_path: Path) -> None:
    model = write_colour_model(tmp_path / "rgb.onnx", size=SIZE, channel_order="rgb")
    with Segmenter.open(model, backend="onnxruntime") as segmenter:
        result = evaluate(segmenter, open_dataset("folder", data, "val"))
    assert [*result.per_class.values()] == pytest.approx(expected_iou(data))


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_backends_agree_on_a_network(backend: str, tiny_checkpoint: Path, tiny_onnx: Path, scenes: Path, need) -> None:
    need(backend)
    dataset = open_dataset("folder", scenes, "val")
    results = []
    for name, model in (("onnxruntime", tiny_onnx), (backend, tiny_checkpoint if backend == "torch" else tiny_onnx)):
        with Segmenter.open(model, backend=name, precision="fp32") as segmenter:
            results.append(evaluate(segmenter, dataset))
    assert results[0].images == 24
    assert results[0].miou > 20  # it knows something of the scenes, so that agreement means something
    assert abs(results[0].miou - results[1].miou) < 0.05  # the budget for backends, in mIoU
    assert abs(results[0].pixel_accuracy - results[1].pixel_accuracy) < 0.1


def test_labels_that_lie_on_their_side(colours: Segmenter, tmp_path: Path) -> None:
    for place, (truth, right) in {"turned": ((97, 57), False), "half": ((29, 49), True)}.items():
        root = tmp_path / place
        (root / "val").mkdir(parents=True)
        write_classes(root)
        write_pair(root / "val", "one", np.zeros((57, 97), np.uint8), np.zeros(truth, np.uint8))
        dataset = open_dataset("folder", root, "val")
        if right:
            assert evaluate(colours, dataset).miou == pytest.approx(100)
        else:
            with pytest.raises(InputError, match=r"one\.png: labels are 97x57, but the image is 57x97"):
                evaluate(colours, dataset)
