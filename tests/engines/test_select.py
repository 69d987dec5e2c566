"""Which of a bundle's files a backend runs, at each precision, on the real runtimes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy.artifact import Artifact, resolve
from ddsm_deploy.engines import (
    EngineOptions,
    available_precisions,
    open_engine,
    possible_precisions,
    runs_at,
    select,
)
from ddsm_deploy.errors import ArtifactError, BackendError
from ddsm_deploy.images import read_image


@pytest.fixture(scope="module")
def artifact(tiny_bundle: Path) -> Artifact:
    return resolve(tiny_bundle)


@pytest.mark.parametrize(
    ("backend", "precision", "file"),
    [
        ("onnxruntime", None, "model.onnx"),
        ("onnxruntime", "fp32", "model.onnx"),
        ("onnxruntime", "fp16", "model.fp16.onnx"),
        ("onnxruntime", "int8", "model.int8.onnxruntime.onnx"),
        ("openvino", None, "model.onnx"),
        ("openvino", "bf16", "model.onnx"),
        ("openvino", "int8", "model.int8.openvino.onnx"),
        ("openvino", "int8+bf16", "model.int8.openvino.onnx"),
        ("torch", None, "model.safetensors"),
        ("torch", "bf16", "model.safetensors"),
    ],
)
def test_the_file_that_runs(artifact: Artifact, backend: str, precision: str | None, file: str) -> None:
    part = select(artifact, backend, precision)
    assert part.file("checkpoint" if backend == "torch" else "onnx").name == file


def test_what_runs_is_what_was_asked_for(artifact: Artifact, scenes: Path) -> None:
    image = cv2.resize(read_image(min((scenes / "images").glob("*.png"))), (96, 64))[np.newaxis]
    with open_engine(artifact, "onnxruntime") as engine:  # type: ignore[attr-defined]
        expected = engine.run({"image": image})["mask"]
    for backend, precision in (("onnxruntime", "int8"), ("openvino", "int8"), ("onnxruntime", "fp16")):
        with open_engine(artifact, backend, EngineOptions(precision=precision)) as engine:  # type: ignore[attr-defined]
            assert engine.precision == precision
            mask = engine.run({"image": image})["mask"]
            assert (mask == expected).mean() > 0.9  # the budget that these files were made with
            assert precision == "fp16" or (mask != expected).any()  # it really is another file


def test_what_there_is_not_is_listed(artifact: Artifact) -> None:
    with pytest.raises(BackendError) as caught:
        open_engine(artifact, "onnxruntime", EngineOptions(precision="int8+fp16"))
    assert "has no file for onnxruntime at int8+fp16 (onnx int8+fp16), only onnx fp32, " in str(caught.value)
    assert "; ask for fp32 or fp16 or int8, or add it; " in str(caught.value)
    assert "onnx fp32, checkpoint fp32, onnx fp16, onnx int8 for onnxruntime, onnx int8 for openvino" in str(
        caught.value
    )


def test_a_file_of_another_backend_runs_only_where_it_is_named(artifact: Artifact, tiny_bundle: Path) -> None:
    (other,) = [variant for variant in artifact.variants if variant.target == "openvino"]
    alone = Artifact(artifact.name, artifact.spec, artifact.files, (other,))
    with pytest.raises(BackendError, match="a file of another backend runs only where it is named itself"):
        open_engine(alone, "onnxruntime", EngineOptions(precision="int8"))
    assert "int8" not in possible_precisions(alone, "onnxruntime")
    named = resolve(tiny_bundle / "model.int8.openvino.onnx")
    with open_engine(named, "onnxruntime") as engine:  # type: ignore[attr-defined]
        assert engine.precision == "int8"


def test_an_engine_that_is_not_there(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match=r"has no engine, only onnx fp32, .*; make one with: ddsm build"):
        select(artifact, "tensorrt")
    assert possible_precisions(artifact, "tensorrt") == ()


def test_what_a_backend_may_make_of_the_files(artifact: Artifact) -> None:
    assert possible_precisions(artifact, "onnxruntime") == ("fp32", "fp16", "int8")
    assert possible_precisions(artifact, "openvino") == ("fp32", "fp16", "bf16", "int8", "int8+bf16")
    assert possible_precisions(artifact, "torch") == ("fp32", "bf16")
    for part in artifact.parts():
        if "onnx" in part.files:
            found = runs_at("openvino", part)
            assert found[0] == part.spec.precision
            assert ("bf16" in available_precisions("openvino")) == any("bf16" in p for p in found) or (
                part.spec.precision == "fp16"
            )


def test_torch_makes_fp16_of_the_checkpoint_where_it_is_asked_for(tiny_bundle: Path, need) -> None:
    need("torch")
    bundle = resolve(tiny_bundle)
    assert "fp16" not in possible_precisions(bundle, "torch")
    with open_engine(bundle, "torch", EngineOptions(precision="fp16")) as engine:  # type: ignore[attr-defined]
        assert engine.precision == "fp16"
    with pytest.raises(BackendError, match="for torch at int8"):
        open_engine(bundle, "torch", EngineOptions(precision="int8"))
