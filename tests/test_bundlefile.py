"""Bundles, mostly of format 2: their record, zips, and one clear line for each way in which they can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_graph import colour_graph, colour_spec

from ddsm_deploy.artifact import resolve
from ddsm_deploy.bundlefile import FREE_GROWTH, MAX_RECORD, read_bundle, unpack
from ddsm_deploy.cache import cache_folder
from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.spec import sha256_of

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ddsm-deploy"


def write_model(path: Path, *, precision: str = "fp32", target: str = "") -> Path:
    """The colour model under another label: what is in the graph does not matter here."""
    import onnx

    spec = colour_spec().replace(precision=precision)
    onnx.save(colour_graph(spec.with_provenance(target=target) if target else spec), path)
    return path


def write_bundle(folder: Path, edit: Edit = lambda record: None) -> Path:
    """fp32 for all, int8 for two backends."""
    folder.mkdir(parents=True)
    forms = [("fp32", ""), ("int8", "openvino"), ("int8", "onnxruntime")]
    entries = []
    for precision, target in forms:
        path = write_model(folder / f"m.{precision}.{target}.onnx", precision=precision, target=target)
        entry = {"file": path.name, "kind": "onnx", "precision": precision, "sha256": sha256_of(path)}
        entries.append({**entry, "target": target} if target else entry)
    record = {"format": 2, "name": "colours", "artifacts": entries}
    edit(record)
    (folder / "bundle.json").write_text(json.dumps(record))
    return folder


def zip_of(folder: Path, path: Path, *, prefix: str = "", leave_out: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            if file.name != leave_out:
                archive.write(file, prefix + file.name)
    return path


def test_variants_beside_the_reference(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "b")
    artifact = resolve(folder)
    assert dict(artifact.files) == {"onnx": folder / "m.fp32..onnx"}
    assert artifact.spec.precision == "fp32"
    found = [(v.spec.precision, v.target, dict(v.files)) for v in artifact.variants]
    assert found == [
        ("int8", target, {"onnx": folder / f"m.int8.{target}.onnx"}) for target in ("openvino", "onnxruntime")
    ]
    assert artifact.contents() == "onnx fp32, onnx int8 for openvino, onnx int8 for onnxruntime"


def test_without_a_float32_file_the_first_is_the_reference(tmp_path: Path) -> None:
    artifact = resolve(write_bundle(tmp_path / "b", lambda r: r["artifacts"].pop(0)))
    assert (artifact.spec.precision, artifact.target, len(artifact.variants)) == ("int8", "openvino", 1)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r.update(format=4), "format 4; this version reads up to 3; update ddsm-deploy"),
        (lambda r: r.update(format="2"), "update ddsm-deploy"),
        (lambda r: r["artifacts"][1].update(target="onnxruntime"), "lists two of onnx int8 for onnxruntime"),
        (lambda r: r["artifacts"][1].pop("target"), "says that m.int8.openvino.onnx is onnx int8, but the file itself"),
        (lambda r: r["artifacts"][0].update(precision="bf16"), "but the file itself says onnx fp32; refused"),
        (lambda r: r["artifacts"][0].update(precision="fp8"), "precision 'fp8'; expected one of fp32"),
        (lambda r: r["artifacts"][0].update(kind="engine"), "is of kind 'engine' and has no record"),
        (lambda r: r["artifacts"][0].update(record="x.json"), "is of kind 'onnx' and has a record"),
        (lambda r: r["artifacts"][0].update(file="sub/m.onnx"), "refers to 'sub/m.onnx' outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file="..\\m.onnx"), "outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file=".."), "refers to '..' outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file=""), "refers to '' outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file="bundle.json"), "refers to 'bundle.json' outside the bundle"),
        (lambda r: r["artifacts"][0].update(file="a\0b"), "outside the bundle; refused"),
        (lambda r: r["artifacts"][0].update(file=7), "file of a member is 7, not a text"),
        (lambda r: r["artifacts"][0].pop("sha256"), "not a bundle record"),
        (lambda r: r["artifacts"][0].update(sha256="0" * 64), "damaged"),
        (lambda r: r["artifacts"][1].update(file="m.fp32..onnx", sha256=r["artifacts"][0]["sha256"]), "lists m.fp32"),
        (lambda r: r.update(artifacts=7), "not a bundle record"),
    ],
)
def test_a_wrong_record_is_one_line(tmp_path: Path, edit: Edit, said: str) -> None:
    folder = write_bundle(tmp_path / "b", edit)
    zipped = zip_of(folder, tmp_path / "b.zip")
    for model in (folder, zipped):
        with pytest.raises(ArtifactError) as caught:
            resolve(model)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_file_with_another_channel_order_is_not_the_same_model(tmp_path: Path) -> None:
    import onnx

    def swap(record: dict[str, Any]) -> None:
        path = tmp_path / "b" / record["artifacts"][1]["file"]
        spec = colour_spec(channel_order="rgb").replace(precision="int8").with_provenance(target="openvino")
        onnx.save(colour_graph(spec), path)
        record["artifacts"][1]["sha256"] = sha256_of(path)

    with pytest.raises(ArtifactError, match=r"not of one model \(their channel order differ\)"):
        resolve(write_bundle(tmp_path / "b", swap))


def test_weights_beside_the_file_are_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import external_data_helper

    def outside(record: dict[str, Any]) -> None:
        path = tmp_path / "b" / record["artifacts"][0]["file"]
        model = onnx.load(path)
        external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
        onnx.save(model, path)
        record["artifacts"][0]["sha256"] = sha256_of(path)

    with pytest.raises(ArtifactError, match=r"its weights lie in w\.bin, which no sha256 of the bundle covers"):
        resolve(write_bundle(tmp_path / "b", outside))


class TestZip:
    @pytest.mark.parametrize("prefix", ["", "colours/"])
    def test_it_is_the_folder(self, tmp_path: Path, cache: Path, prefix: str) -> None:
        folder = write_bundle(tmp_path / "b")
        zipped = zip_of(folder, tmp_path / "b.zip", prefix=prefix)
        artifact = resolve(zipped)
        place = cache / "bundles" / sha256_of(zipped)
        assert artifact.file("onnx") == place / "m.fp32..onnx"
        assert {p.name: p.read_bytes() for p in place.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
        before = {p.name: p.stat().st_mtime_ns for p in place.iterdir()}
        assert resolve(zipped) == artifact
        assert {p.name: p.stat().st_mtime_ns for p in place.iterdir()} == before  # unpacked once
        assert sorted(p.name for p in place.parent.iterdir()) == [".lock", place.name]  # and nothing left beside it

    def test_only_members_are_unpacked(self, tmp_path: Path) -> None:
        zipped = zip_of(write_bundle(tmp_path / "b"), tmp_path / "b.zip")
        with zipfile.ZipFile(zipped, "a") as archive:
            archive.writestr("../escaped.txt", "x")
            archive.writestr("notes.txt", "x")
        assert sorted(p.name for p in unpack(zipped).iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
        assert not list(tmp_path.rglob("escaped.txt"))

    @pytest.mark.parametrize("name", ["m.int8.openvino.onnx", "bundle.json"])
    @pytest.mark.parametrize("harm", [lambda p: p.write_bytes(p.read_bytes()[:-1] + b"?"), Path.unlink])
    def test_a_damaged_copy_is_made_anew(self, tmp_path: Path, name: str, harm: Callable[[Path], object]) -> None:
        folder = write_bundle(tmp_path / "b")
        zipped = zip_of(folder, tmp_path / "b.zip")
        place = unpack(zipped)
        harm(place / name)
        assert unpack(zipped) == place
        assert (place / name).read_bytes() == (folder / name).read_bytes()
        read_bundle(place)

    def test_a_damaged_zip_at_every_place(self, tmp_path: Path) -> None:
        """One wrong byte either harms nothing that counts, or is told in a line; the members are never other ones."""
        folder = write_bundle(tmp_path / "b")
        whole = zip_of(folder, tmp_path / "b.zip").read_bytes()
        bad = tmp_path / "bad.zip"
        told = 0
        for place in range(0, len(whole), 7):
            bad.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            try:
                found = unpack(bad)
            except ArtifactError as exc:
                told += 1
                assert "\n" not in str(exc)
            else:
                for file in folder.iterdir():
                    assert (found / file.name).read_bytes() == file.read_bytes()
        assert told > len(whole) / 7 / 2  # most bytes are those of members

    def test_a_zip_cut_short(self, tmp_path: Path) -> None:
        whole = zip_of(write_bundle(tmp_path / "b"), tmp_path / "b.zip").read_bytes()
        cut = tmp_path / "cut.zip"
        for length in (*range(0, len(whole), 101), len(whole) - 1):
            cut.write_bytes(whole[:length])
            with pytest.raises(ArtifactError, match="damaged, or not a zip file"):
                resolve(cut)

    def test_what_is_missing_inside(self, tmp_path: Path) -> None:
        folder = write_bundle(tmp_path / "b")
        for leave_out, said in (("bundle.json", "0 files bundle.json in the zip"), ("m.fp32..onnx", "is missing in")):
            with pytest.raises(ArtifactError, match=said):
                resolve(zip_of(folder, tmp_path / f"{leave_out}.zip", leave_out=leave_out))

    def test_two_bundles_in_one_zip(self, tmp_path: Path) -> None:
        folder = write_bundle(tmp_path / "b")
        zipped = zip_of(folder, tmp_path / "b.zip")
        with zipfile.ZipFile(zipped, "a") as archive:
            archive.write(folder / "bundle.json", "other/bundle.json")
        with pytest.raises(ArtifactError, match=r"2 files bundle\.json in the zip; expected one"):
            resolve(zipped)

    def test_an_encrypted_member(self, tmp_path: Path) -> None:
        data = bytearray(zip_of(write_bundle(tmp_path / "b"), tmp_path / "b.zip").read_bytes())
        at = data.rfind(b"PK\x01\x02")  # the last entry of the directory; bytes 8 and 9 are its flags
        data[at + 8] |= 1
        (tmp_path / "b.zip").write_bytes(data)
        with pytest.raises(ArtifactError, match="encrypted"):
            resolve(tmp_path / "b.zip")

    def test_a_bomb_is_refused_before_it_is_unpacked(self, tmp_path: Path, cache: Path) -> None:
        folder = write_bundle(tmp_path / "b")
        (folder / "m.fp32..onnx").write_bytes(bytes(2 * FREE_GROWTH))  # 32 000 000
        with pytest.raises(ArtifactError, match=r"its \d+ bytes would unpack to 3200\d{4}; refused"):
            resolve(zip_of(folder, tmp_path / "bomb.zip"))
        assert [p.name for p in (cache / "bundles").iterdir()] == [".lock"]

    def test_a_vast_record_is_refused(self, tmp_path: Path) -> None:
        folder = write_bundle(tmp_path / "b", lambda r: r.update(note=" " * MAX_RECORD))
        with pytest.raises(ArtifactError, match=r"its bundle\.json has \d+ bytes; refused"):
            resolve(zip_of(folder, tmp_path / "b.zip"))

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(ArtifactError, match="can't be read or unpacked"):
            resolve(zip_of(write_bundle(tmp_path / "b"), tmp_path / "b.zip"))

    def test_many_processes_at_once(self, tmp_path: Path, cache: Path) -> None:
        """Each gets the whole bundle, whether it unpacks, meets another's, or finds a damaged copy."""
        zipped = zip_of(write_bundle(tmp_path / "b"), tmp_path / "b.zip")
        place = cache / "bundles" / sha256_of(zipped)
        place.mkdir(parents=True)
        (place / "bundle.json").write_text("{}")
        code = "import sys; from ddsm_deploy.artifact import resolve; print(resolve(sys.argv[1]).contents())"
        command = [sys.executable, "-c", code, str(zipped)]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(6)]
        said = {process.communicate(timeout=60)[0].strip() for process in started}
        assert said == {"onnx fp32, onnx int8 for openvino, onnx int8 for onnxruntime"}
        assert sorted(p.name for p in place.parent.iterdir()) == [".lock", place.name]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache" / "ddsm-deploy"
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for unset in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_folder() == tmp_path / "me" / ".cache" / "ddsm-deploy"
