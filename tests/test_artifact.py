"""Finding models: files, bundles, shipped names, and one clear line for each way in which they can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from colour_graph import colour_spec, write_colour_model

from ddsm_deploy.artifact import Artifact, read_checkpoint_spec, resolve, shipped_models
from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.spec import METADATA_KEY, sha256_of

Edit = Callable[[dict[str, Any]], object]


def write_checkpoint(path: Path, metadata: dict[str, str] | None = None) -> Path:
    metadata = {METADATA_KEY: colour_spec().to_json()} if metadata is None else metadata
    safetensors.numpy.save_file({"weight": np.arange(12, dtype=np.float32)}, path, metadata=metadata)
    return path


def write_bundle(folder: Path, edit: Edit = lambda record: None) -> Path:
    folder.mkdir()
    files = {
        "onnx": write_colour_model(folder / "model.onnx"),
        "checkpoint": write_checkpoint(folder / "model.safetensors"),
    }
    record = {
        "format": 1,
        "name": "colours",
        "artifacts": [
            {"file": path.name, "kind": kind, "precision": "fp32", "sha256": sha256_of(path)}
            for kind, path in files.items()
        ],
    }
    edit(record)
    (folder / "bundle.json").write_text(json.dumps(record))
    return folder


def test_an_onnx_file(tmp_path: Path) -> None:
    path = write_colour_model(tmp_path / "frames.onnx")
    assert resolve(path) == resolve(str(path)) == Artifact("frames", colour_spec(), {"onnx": path})


def test_a_checkpoint_without_torch(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "frames.SafeTensors")
    assert resolve(path) == Artifact("frames", colour_spec(), {"checkpoint": path})


def test_a_checkpoint_as_training_writes_it(tiny_checkpoint: Path) -> None:
    from ddsm_deploy.model.checkpoint import read_spec

    assert read_checkpoint_spec(tiny_checkpoint) == read_spec(tiny_checkpoint)


def test_a_bundle(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    artifact = resolve(folder)
    assert (artifact.name, artifact.spec) == ("colours", colour_spec())
    assert artifact.file("onnx") == folder / "model.onnx"
    assert artifact.file("checkpoint") == folder / "model.safetensors"


def test_a_missing_kind_says_what_to_run(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "frames.safetensors")
    with pytest.raises(ArtifactError, match=r"ddsm export .*frames\.safetensors -o .*frames\.onnx"):
        resolve(checkpoint).file("onnx")
    with pytest.raises(ArtifactError, match=r"has no checkpoint \(\.safetensors\), only onnx"):
        resolve(write_colour_model(tmp_path / "frames.onnx")).file("checkpoint")


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ArtifactError, match="no model 'ddsm-nothing'") as caught:
        resolve("ddsm-nothing")
    listed = ", ".join(shipped_models()) or "none"
    assert f"(shipped: {listed})" in str(caught.value)


def test_shipped_models_resolve() -> None:
    for name in shipped_models():
        artifact = resolve(name)
        assert artifact.name == name
        assert set(artifact.files) == {"onnx", "checkpoint"}


@pytest.mark.parametrize("name", ["notes.txt", "x" * 300, "nul\0byte"])
def test_what_is_no_model(tmp_path: Path, name: str) -> None:
    if name == "notes.txt":
        (tmp_path / name).write_text("hello")
    with pytest.raises(ArtifactError):
        resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"\x02\0\0\0", "cut short"),
        (b"\xff" * 40, "not a safetensors file"),
        (b"\x08\0\0\0\0\0\0\0not json", "its header can't be read"),
        (b"\x02\0\0\0\0\0\0\0[]", "its header can't be read"),
        (b"\x02\0\0\0\0\0\0\0{}" + bytes(9), "damaged or cut short"),
        (b"\x02\0\0\0\0\0\0\0{}", "no ddsm checkpoint"),
    ],
)
def test_a_damaged_checkpoint(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=said):
        resolve(path)


def test_a_truncated_or_foreign_checkpoint(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            resolve(cut)
    with pytest.raises(ArtifactError, match="no ddsm checkpoint"):
        resolve(write_checkpoint(tmp_path / "foreign.safetensors", {"format": "pt"}))


def test_a_changed_file_in_a_bundle_is_damaged(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x77")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: damaged \(sha256"):
        resolve(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r.update(format=4), "update ddsm-deploy"),
        (lambda r: r.pop("artifacts"), "not a bundle record"),
        (lambda r: r.update(artifacts=[]), "lists no artefact"),
        (lambda r: r["artifacts"][0].update(kind="pickle"), "kind 'pickle'"),
        (lambda r: r["artifacts"].append(r["artifacts"][0]), "two of onnx fp32; expected one each"),
        (lambda r: r["artifacts"][0].update(file="../model.onnx"), "outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file="/etc/passwd"), "outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file="gone.onnx"), "can't be read"),
    ],
)
def test_a_wrong_bundle_record(tmp_path: Path, edit: Edit, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        resolve(write_bundle(tmp_path / "bundle", edit))


def test_a_bundle_whose_files_are_of_two_models(tmp_path: Path) -> None:
    other = colour_spec().replace(classes=("a", "b", "c"))

    def swap(record: dict[str, Any]) -> None:
        path = write_checkpoint(tmp_path / "bundle" / "model.safetensors", {METADATA_KEY: other.to_json()})
        record["artifacts"][1]["sha256"] = sha256_of(path)

    with pytest.raises(ArtifactError, match="not of one model"):
        resolve(write_bundle(tmp_path / "bundle", swap))


def test_a_folder_without_record_or_with_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a model bundle"):
        resolve(tmp_path)
    (tmp_path / "bundle.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ArtifactError, match="not a bundle record"):
        resolve(tmp_path)
