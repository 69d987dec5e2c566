"""The table of `ddsm eval`: which rows it has, what stands in them, and its gates, on models of known answers."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from colour_data import expected_iou, write_colour_data
from colour_graph import write_colour_model
from onnx import helper

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.datasets import Dataset, open_dataset
from ddsm_deploy.engines import available_precisions
from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.evaluate.accuracy import evaluate
from ddsm_deploy.evaluate.table import Table, TableOptions, Task, score_all, tasks
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import METADATA_KEY, ModelSpec


def rewritten(source: Path, path: Path, *, target: str = "", **changes: object) -> Path:
    """The same graph with another record."""
    model = onnx.load(source)
    spec = ModelSpec.from_json(model.metadata_props[0].value).replace(**changes)
    helper.set_model_props(
        model, {METADATA_KEY: spec.with_provenance(**{"target": target} if target else {}).to_json()}
    )
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    right = write_colour_model(folder / "right.onnx", size=(64, 96))
    rgb = write_colour_model(folder / "rgb.onnx", size=(64, 96), channel_order="rgb")
    rewritten(rgb, folder / "mirrored.onnx", channel_order="bgr")  # red and blue trade places
    for target in ("onnxruntime", "openvino", "tensorrt"):
        rewritten(right, folder / f"int8-{target}.onnx", target=target, precision="int8")
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Artifact:
    """A float32 file with an int8 one for each of three backends."""
    right = resolve(folder / "right.onnx")
    variants = tuple(resolve(folder / f"int8-{target}.onnx") for target in ("onnxruntime", "openvino", "tensorrt"))
    return Artifact("colours", right.spec, right.files, variants)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset("folder", write_colour_data(tmp_path_factory.mktemp("data")), "val")


def described(task: Task) -> tuple[str, str, str | None]:
    (file,) = task.artifact.files.values()
    return file.stem, task.backend, task.precision


def test_rows_that_are_asked_for(folder: Path) -> None:
    models = [folder / "right.onnx", folder / "mirrored.onnx"]
    found = tasks(models, TableOptions(backends=("openvino", "torch"), precisions=("fp32", "bf16")))
    assert [described(task) for task in found] == [
        (stem, backend, precision)
        for stem in ("right", "mirrored")
        for backend in ("openvino", "torch")
        for precision in ("fp32", "bf16")
    ]
    assert all(task.named for task in found)
    (only,) = tasks(models[:1], TableOptions())
    assert (described(only), only.named) == (("right", "auto", None), False)


def test_all_rows_of_a_bundle(bundle: Artifact, need) -> None:
    """Each file on the backend that it was written for; what is for TensorRT on all that read ONNX."""
    for module in ("onnxruntime", "openvino"):
        need(module)
    found = [described(task) for task in tasks([bundle], TableOptions(everything=True))]
    half = "bf16" in available_precisions("openvino")
    assert found == [
        ("right", "onnxruntime", None),
        ("right", "openvino", None),
        *[("right", "openvino", "bf16")] * half,
        ("int8-onnxruntime", "onnxruntime", None),
        ("int8-openvino", "openvino", None),
        *[("int8-openvino", "openvino", "int8+bf16")] * half,
        ("int8-tensorrt", "onnxruntime", None),
        ("int8-tensorrt", "openvino", None),
        *[("int8-tensorrt", "openvino", "int8+bf16")] * half,
    ]
    only = tasks([bundle], TableOptions(everything=True, backends=("onnxruntime",)))
    assert [described(task)[0] for task in only] == ["right", "int8-onnxruntime", "int8-tensorrt"]
    assert not any(task.named for task in only)


def test_what_stands_in_the_rows(folder: Path, dataset: Dataset) -> None:
    steps: list[tuple[str, int, int]] = []
    models = [folder / "right.onnx", folder / "mirrored.onnx", folder / "int8-tensorrt.onnx"]
    table = score_all(
        models, dataset, TableOptions(backends=("onnxruntime",)), progress=lambda *step: steps.append(step)
    )
    right, mirrored, other = table.rows
    root = dataset.samples[0].image.parents[1]
    assert right.result is not None
    assert right.result.miou == pytest.approx(sum(expected_iou(root)) / 3)
    assert (right.file, right.written, right.drop) == ("right.onnx", "fp32", 0)
    assert mirrored.result is not None
    with Segmenter.open(models[1], backend="onnxruntime") as segmenter:
        assert mirrored.result == evaluate(segmenter, dataset)
    assert mirrored.drop == pytest.approx(right.result.miou - mirrored.result.miou)
    assert mirrored.drop > 1
    assert other.result is not None
    assert (other.written, other.result.precision, other.drop) == ("int8 for tensorrt", "int8", 0)
    assert steps == [("onnxruntime " + p, n, 5) for p in ("fp32", "fp32", "int8") for n in range(1, 6)]

    rows = json.loads(table.to_json())["rows"]
    assert rows[1] == {
        **json.loads(mirrored.result.to_json()),
        "file": "mirrored.onnx",
        "written": "fp32",
        "drop": mirrored.drop,
        "error": None,
    }
    least = right.result.miou
    assert table.failures(min_miou=least) == [
        f"mirrored.onnx on onnxruntime fp32: mIoU is {mirrored.result.miou:.3f}; expected at least {least:g}"
    ]
    assert table.failures(max_drop=0.5) == [
        f"mirrored.onnx on onnxruntime fp32: mIoU lies {mirrored.drop:.3f} below the first row's; expected at most 0.5"
    ]
    assert table.failures(max_drop=mirrored.drop, min_miou=mirrored.result.miou) == []
    assert Table((right,)).to_json() == right.result.to_json()


def test_ctrl_c_leaves_the_rows_that_are_done(folder: Path, dataset: Dataset) -> None:
    seen: list[str] = []

    def stop(text: str, done: int, total: int) -> None:
        seen.append(text)
        if len(seen) == total + 2:  # in the second row
            raise KeyboardInterrupt

    models = [folder / "right.onnx", folder / "mirrored.onnx"]
    table = score_all(models, dataset, TableOptions(backends=("onnxruntime",)), progress=stop)
    assert table.interrupted and [row.file for row in table.rows] == ["right.onnx"]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):  # nothing is done yet
        score_all(models[:1], dataset, TableOptions(backends=("onnxruntime",)), progress=lambda *_: stop("", 0, -1))


def test_a_row_that_can_not_run_says_why(folder: Path, dataset: Dataset, bundle: Artifact, need) -> None:
    need("openvino")
    asked = TableOptions(backends=("onnxruntime", "openvino"), precisions=("fp16", "fp32"))
    table = score_all([folder / "right.onnx"], dataset, asked)
    reasons = [row.error for row in table.rows]
    assert "onnxruntime runs right at fp32" in reasons[0]
    assert "openvino" in reasons[2]
    assert (reasons[1], reasons[3]) == ("", "")
    assert table.errors() == [reasons[0], reasons[2]]
    assert [row.drop for row in table.rows] == [None, 0, None, 0]  # against the first one that ran
    fields = json.loads(table.to_json())["rows"][0]
    assert (fields["error"], fields["file"], fields["backend"]) == (reasons[0], "right.onnx", "onnxruntime")

    many = score_all([bundle], dataset, TableOptions(everything=True, backends=("onnxruntime",), precisions=("int8",)))
    assert [bool(row.error) for row in many.rows] == [True, False, False]
    assert many.errors() == []  # nobody asked for the first one by name
    none = score_all([folder / "right.onnx"], dataset, TableOptions(everything=True, precisions=("int8",)))
    assert len(none.errors()) == len(none.rows) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ("tflite",)}, "backend is 'tflite'; expected auto or one of torch"),
        ({"precisions": ("fp32", "bf8")}, "precision is 'bf8'"),
        ({"threads": 0}, "threads is 0"),
        ({"everything": True, "backends": ("auto",)}, "give --all or --backend auto"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TableOptions(**options)


def test_no_such_model(dataset: Dataset) -> None:
    with pytest.raises(ArtifactError, match="no model 'nothing'"):
        score_all(["nothing"], dataset)


def test_both_ways_of_sampling_are_rows(tiny_fused: Path, scenes: Path, missing) -> None:
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)
    options = TableOptions(backends=("onnxruntime",), samplings=("portable", "fused"))
    table = score_all([tiny_fused], open_dataset("folder", scenes, ""), options)
    assert [row.fields()["sampling"] for row in table.rows] == ["portable", "fused"]
    assert [row.result.label for row in table.rows if row.result] == ["onnxruntime fp32", "onnxruntime fp32 fused"]
    assert table.rows[1].drop == pytest.approx(0, abs=0.1)  # 24 frames of 12288 pixels
    with pytest.raises(ConfigError, match="sampling is 'gather'; expected one of fused, portable"):
        TableOptions(samplings=("gather",))
