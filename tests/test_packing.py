"""`make_bundle`: what it puts together, that it is reproducible, and what it refuses to put together."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from colour_graph import colour_graph, colour_spec

from ddsm_deploy.artifact import resolve
from ddsm_deploy.enginefile import EngineRecord, record_path
from ddsm_deploy.errors import ArtifactError, ConfigError, InputError
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.spec import METADATA_KEY, ModelSpec, sha256_of


def spec_of(precision: str = "fp32", target: str = "", **provenance: str) -> ModelSpec:
    facts = {**provenance, **({"target": target} if target else {})}
    return colour_spec().replace(precision=precision, provenance=facts)


def write_onnx(path: Path, spec: ModelSpec) -> Path:
    onnx.save(colour_graph(spec), path)
    return path


def write_checkpoint(path: Path, spec: ModelSpec) -> Path:
    safetensors.numpy.save_file({"w": np.arange(3.0)}, path, metadata={METADATA_KEY: spec.to_json()})
    return path


def write_fake_engine(path: Path, onnx_file: Path, *, target: str = "tensorrt") -> Path:
    """Bytes that no GPU would run, under a record that is as a build writes it: packing never looks inside."""
    blob = b"engine" * 50
    path.write_bytes(blob)
    record = EngineRecord(
        sha256=sha256_of(path),
        bytes=len(blob),
        target=target,
        version="10.13.3.9",
        spec=spec_of("fp16", target),
        onnx_sha256=sha256_of(onnx_file),
        graph_sha256="0" * 64,
        compute_capabilities=("86",),
        gpu="",
        inputs=(),
        outputs=(),
        profiles={},
        layers={},
        options={},
        versions={},
        parity={},
    )
    record_path(path).write_text(record.to_json(), encoding="utf-8")
    return path


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """A checkpoint, and all that was made from it."""
    checkpoint = write_checkpoint(tmp_path / "c.safetensors", spec_of())
    source = {"source_sha256": sha256_of(checkpoint)}
    fp32 = write_onnx(tmp_path / "a.onnx", spec_of(**source))
    return {
        "checkpoint": checkpoint,
        "fp32": fp32,
        "int8": write_onnx(tmp_path / "i.onnx", spec_of("int8", "openvino", float_sha256=sha256_of(fp32))),
        "engine": write_fake_engine(tmp_path / "e.engine", fp32),
    }


def test_a_folder_of_all_forms(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "mine"
    report = make_bundle(folder, list(forms.values()))
    names = [
        "bundle.json",
        "model.fp16.tensorrt.engine",
        "model.fp16.tensorrt.engine.json",
        "model.int8.openvino.onnx",
        "model.onnx",
        "model.safetensors",
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert report.bytes == sum((folder / name).stat().st_size for name in names[1:])
    artifact = resolve(folder)
    assert artifact.name == "mine"
    assert artifact.contents() == "onnx fp32, checkpoint fp32, onnx int8 for openvino, engine fp16 for tensorrt"
    for part, form in zip(artifact.parts(), ("fp32", "checkpoint", "int8", "engine"), strict=True):
        (path,) = part.files.values()
        assert path.read_bytes() == forms[form].read_bytes()
    entry = json.loads((folder / "bundle.json").read_text())["artifacts"][3]
    assert entry["record_sha256"] == sha256_of(record_path(forms["engine"]))


def test_an_altered_engine_or_record_is_noticed(forms: dict[str, Path], tmp_path: Path) -> None:
    for name in ("model.fp16.tensorrt.engine", "model.fp16.tensorrt.engine.json"):
        folder = tmp_path / name
        make_bundle(folder, list(forms.values()))
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(ArtifactError, match=rf"{name}: damaged \(sha256"):
            resolve(folder)
        (folder / name).unlink()
        with pytest.raises(ArtifactError, match=rf"{name}: can't be read"):
            resolve(folder)


def test_equal_members_give_equal_zips(forms: dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "m.zip", tmp_path / "other" / "m.zip"
    make_bundle(first, list(forms.values()))
    make_bundle(tmp_path / "m", list(reversed(forms.values())))
    make_bundle(second, [tmp_path / "m"])
    assert first.read_bytes() == second.read_bytes()
    assert resolve(first).contents() == resolve(tmp_path / "m").contents()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "bundle.json"


def test_a_bundle_is_extended_in_its_own_place(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make_bundle(folder, [forms["fp32"]])
    (folder / "README.txt").write_text("mine")
    make_bundle(folder, [folder, forms["int8"]], name="named")
    assert resolve(folder).contents() == "onnx fp32, onnx int8 for openvino"
    assert resolve(folder).name == "named"
    assert (folder / "README.txt").read_text() == "mine"
    with pytest.raises(InputError, match=r"would lose model\.onnx, model\.int8\.openvino\.onnx, of the bundle"):
        make_bundle(folder, [forms["checkpoint"]])
    assert resolve(folder).contents() == "onnx fp32, onnx int8 for openvino"
    make_bundle(folder, [forms["checkpoint"]], overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == ["README.txt", "bundle.json", "model.safetensors"]


def test_what_belongs_to_no_bundle_is_kept(forms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for mine in (tmp_path / "run" / "model.safetensors", tmp_path / "photos.zip"):
        mine.write_bytes(b"mine")
        output = mine.parent if mine.suffix == ".safetensors" else mine
        with pytest.raises(InputError, match=rf"would lose {mine.name}, which belongs to no bundle"):
            make_bundle(output, [forms["checkpoint"]])
        assert mine.read_bytes() == b"mine"
        make_bundle(output, [forms["checkpoint"]], overwrite=True)
        make_bundle(output, [forms["checkpoint"]])  # a bundle now, and nothing of it is lost
    with pytest.raises(InputError, match=r"would lose model\.safetensors, of the bundle"):
        make_bundle(tmp_path / "photos.zip", [forms["fp32"]])


def test_work_of_another_model_is_kept(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make_bundle(folder, [forms["checkpoint"], forms["fp32"]])
    other = write_checkpoint(tmp_path / "other.safetensors", spec_of(trained="longer"))
    source = {"source_sha256": sha256_of(other)}
    made = write_onnx(tmp_path / "other.onnx", spec_of(**source))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(
        InputError, match=r"would lose model\.(onnx, model\.safetensors|safetensors, model\.onnx), of the bundle"
    ):
        make_bundle(folder, [other, made])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    again = write_onnx(tmp_path / "again.onnx", spec_of(note="new", source_sha256=sha256_of(forms["checkpoint"])))
    make_bundle(folder, [forms["checkpoint"], again])  # made anew from the same weights
    make_bundle(folder, [other, made], overwrite=True)
    assert sha256_of(folder / "model.safetensors") == sha256_of(other)


def test_a_file_that_the_bundle_does_not_know_is_kept(forms: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make_bundle(folder, [forms["fp32"]])
    (folder / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"would lose model\.safetensors, which belongs to no bundle"):
        make_bundle(folder, [folder, forms["checkpoint"]])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder there"):
        make_bundle(folder, [folder, forms["checkpoint"]], overwrite=True)
    assert resolve(folder).contents() == "onnx fp32"  # as whole as before


def test_a_shipped_model_is_extended(shipped_model: Path, tmp_path: Path) -> None:
    shipped = resolve(shipped_model.name)
    spec = shipped.spec.replace(precision="int8+fp16").with_provenance(target="tensorrt")
    extra = write_onnx(tmp_path / "x.onnx", spec)
    make_bundle(tmp_path / "b", [shipped_model.name, extra])
    added = "onnx int8+fp16 for tensorrt"
    assert added not in shipped.contents()
    assert set(resolve(tmp_path / "b").contents().split(", ")) == {*shipped.contents().split(", "), added}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ("a", "b", "c")}, "classes differ"),
        ({"height": 16}, "height differ"),
        ({"channel_order": "rgb"}, "channel order differ"),
        ({"mean": (1.0, 2.0, 3.0)}, "mean differ"),
    ],
)
def test_files_of_two_models_are_refused(
    forms: dict[str, Path], tmp_path: Path, change: dict[str, object], said: str
) -> None:
    spec = spec_of("int8", source_sha256=sha256_of(forms["checkpoint"]))
    other = write_onnx(tmp_path / "other.onnx", spec.replace(**change))
    with pytest.raises(ArtifactError, match=rf"other\.onnx: not of the same model as .*a\.onnx \(their {said}"):
        make_bundle(tmp_path / "b", [forms["fp32"], other])
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_may_be_of_another_size(forms: dict[str, Path], tmp_path: Path) -> None:
    spec = spec_of(source_sha256=sha256_of(forms["checkpoint"])).replace(height=16, channel_order="rgb")
    make_bundle(tmp_path / "b", [write_onnx(tmp_path / "wide.onnx", spec), forms["checkpoint"]])
    assert resolve(tmp_path / "b").spec.height == 16


def test_files_made_from_other_weights_are_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    other = write_onnx(tmp_path / "other.onnx", spec_of("int8", source_sha256="f" * 64))
    with pytest.raises(ArtifactError, match=r"other\.onnx: made from other weights than .*a\.onnx"):
        make_bundle(tmp_path / "b", [forms["fp32"], forms["checkpoint"], other])
    # a common calibration set is no kinship
    facts = {"calibration.sha256": "c" * 64}
    pair = [
        write_onnx(tmp_path / f"{p}.onnx", spec_of(p, source_sha256=s * 64, **facts))
        for p, s in (("fp32", "a"), ("int8", "b"))
    ]
    with pytest.raises(ArtifactError, match="made from other weights"):
        make_bundle(tmp_path / "b", pair)


def test_kinship_over_several_steps(forms: dict[str, Path], tmp_path: Path) -> None:
    """The INT8 file names only the float file, and that only the checkpoint: together they are one family."""
    make_bundle(tmp_path / "b", [forms["int8"], forms["checkpoint"], forms["fp32"]])
    with pytest.raises(ArtifactError, match="add the file from which both were made"):
        make_bundle(tmp_path / "c", [forms["int8"], forms["checkpoint"]])


def test_two_of_one_form(forms: dict[str, Path], tmp_path: Path) -> None:
    again = write_onnx(tmp_path / "again.onnx", spec_of(source_sha256=sha256_of(forms["checkpoint"]), note="other"))
    with pytest.raises(ConfigError, match=r"a\.onnx and .*again\.onnx are both onnx fp32; a bundle holds one each"):
        make_bundle(tmp_path / "b", [forms["fp32"], again])
    make_bundle(tmp_path / "b", [forms["fp32"], forms["fp32"]])  # the same one twice is one
    assert resolve(tmp_path / "b").contents() == "onnx fp32"


def test_what_cannot_be_written_or_read(forms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "folder.zip").mkdir()
    with pytest.raises(InputError, match=r"folder\.zip: is a folder"):
        make_bundle(tmp_path / "folder.zip", [forms["fp32"]])
    with pytest.raises(InputError, match=r"a\.onnx: is a file"):
        make_bundle(forms["fp32"], [forms["fp32"]])
    with pytest.raises(InputError, match="can't be written"):
        make_bundle(forms["fp32"] / "b", [forms["fp32"]])
    with pytest.raises(ConfigError, match="nothing to put into a bundle"):
        make_bundle(tmp_path / "b", [])
    record_path(forms["engine"]).unlink()
    with pytest.raises(ArtifactError, match=r"its record e\.engine\.json is missing"):
        make_bundle(tmp_path / "b", [forms["fp32"], forms["engine"]])
    assert not list(tmp_path.rglob("*.part"))


def test_it_needs_no_torch_and_no_runtime() -> None:
    code = "import sys, ddsm_deploy.packing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "openvino", "numpy"} & set(done.stdout.split())
