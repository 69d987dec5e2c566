"""A bundle holds one model in every form, with the same weights in each."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ddsm_deploy.artifact import resolve
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import ArtifactError, InputError
from ddsm_deploy.export import ExportOptions, export_onnx, write_bundle
from ddsm_deploy.files import replacing
from ddsm_deploy.onnxfile import external_files
from ddsm_deploy.packing import make_bundle


@pytest.fixture(scope="module")
def bundle(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "mine"
    write_bundle(checkpoint("ddsm"), folder, name="mine", options=ExportOptions(weights="fp16"))
    return folder


def test_it_is_found_and_its_files_are_one_model(bundle: Path) -> None:
    artifact = resolve(bundle)
    assert artifact.name == artifact.spec.name == "mine"
    assert sorted(p.name for p in bundle.iterdir()) == [
        "bundle.json",
        "model.onnx",
        "model.safetensors",
        "model.weights",
    ]
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    masks = []
    for backend in ("torch", "onnxruntime"):
        with open_engine(artifact, backend, EngineOptions()) as engine:
            masks.append(engine.run({"image": image})["mask"])
    assert external_files(bundle / "model.onnx") == ("model.safetensors", "model.weights")
    # the same float16 weights in both: only ties can differ, and the network's logits are far apart
    assert (masks[0] == masks[1]).mean() > 0.999


def test_a_changed_file_is_noticed(bundle: Path, tmp_path: Path) -> None:
    for file in bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("model.onnx", "model.weights"):
        whole = (tmp_path / name).read_bytes()
        middle = len(whole) // 2
        (tmp_path / name).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(ArtifactError, match=rf"{name}: damaged"):
            resolve(tmp_path)
        (tmp_path / name).write_bytes(whole)
    assert resolve(tmp_path)


def test_a_failed_export_leaves_no_bundle(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    with pytest.raises(InputError, match="nowhere"):
        write_bundle(checkpoint("ddsm"), folder, name="b", options=ExportOptions(images=(tmp_path / "nowhere",)))
    with pytest.raises(InputError, match=r"b\.zip: expected a folder's name"):
        write_bundle(checkpoint("ddsm"), tmp_path / "b.zip", name="b", options=ExportOptions())
    with pytest.raises(ArtifactError, match=r"no bundle\.json"):
        resolve(folder)


def test_the_report_names_a_file_that_is_there(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    report = write_bundle(checkpoint("add"), tmp_path / "b", name="b", options=ExportOptions(precision="fp16"))
    assert report.path == tmp_path / "b" / "model.fp16.onnx"
    assert report.path.is_file()


def test_the_checkpoint_is_not_written_over(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source, link = tmp_path / "a.safetensors", tmp_path / "b.onnx"
    source.write_bytes(checkpoint("add").read_bytes())
    link.hardlink_to(source)
    for output in (source, link):
        with pytest.raises(InputError, match=r"belongs to the model that is read|ends in \.onnx"):
            export_onnx(source, output)
    assert source.read_bytes() == checkpoint("add").read_bytes()


def test_no_bundle_is_written_over(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "b"
    write_bundle(checkpoint("add"), folder, name="b", options=ExportOptions(verify=False))
    make_bundle(tmp_path / "b.zip", [folder])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("b.zip", "b/model.onnx", "b/bundle.json", "b/model.safetensors"):
        with pytest.raises(InputError, match=r"bundle|folder|belongs|ends in"):
            export_onnx(checkpoint("add"), tmp_path / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_pipe_or_device_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a device or a pipe"), replacing(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()
