"""Weights that ONNX files share: each tensor once, the same bytes back, and one clear line for all that is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from colour_graph import colour_graph, colour_spec
from onnx import TensorProto, helper, numpy_helper
from painted_graph import PAINT_BYTES, paint, painted_graph, painted_mask, write_painted

from ddsm_deploy.artifact import resolve
from ddsm_deploy.bundlefile import BUNDLE_FILE, unpack
from ddsm_deploy.engines import EngineOptions, open_engine
from ddsm_deploy.errors import ArtifactError, ConfigError, InputError
from ddsm_deploy.onnxfile import external_files
from ddsm_deploy.onnxweights import ALIGNMENT, MIN_SHARED, copy_whole, cut, model_sha256, read_whole
from ddsm_deploy.packing import WEIGHTS, make_bundle, write_whole
from ddsm_deploy.runtime.decisions import facts_of
from ddsm_deploy.runtime.pipeline import identity_of
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.spec import METADATA_KEY, sha256_of

REPO = Path(__file__).parents[1]
A, B, C = paint(1), paint(2), paint(3)
FAMILY = {"source_sha256": "a" * 64}
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def forms(tmp_path: Path) -> list[Path]:
    """Three ONNX files that have layers in common, self-contained."""
    return [
        write_painted(tmp_path / "a.onnx", A, B, **FAMILY),
        write_painted(tmp_path / "o.onnx", B, C, precision="int8", target="openvino", **FAMILY),
        write_painted(tmp_path / "r.onnx", C, A, B, precision="int8", target="onnxruntime", **FAMILY),
    ]


@pytest.fixture
def bundle(forms: list[Path], tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "made" / "mine", forms).path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


MEMBERS = ("model.onnx", "model.int8.openvino.onnx", "model.int8.onnxruntime.onnx")


# ---- what is written


def test_each_tensor_is_there_once(forms: list[Path], bundle: Path) -> None:
    """Of seven tensors three are distinct."""
    assert sorted(contents(bundle)) == sorted((*MEMBERS, BUNDLE_FILE, WEIGHTS))
    weights = (bundle / WEIGHTS).read_bytes()
    assert 3 * PAINT_BYTES <= len(weights) <= 3 * (PAINT_BYTES + ALIGNMENT)
    assert all(weights.count(layer.tobytes()) == 1 for layer in (A, B, C))
    for form, name in zip(forms, MEMBERS, strict=True):
        assert (bundle / name).stat().st_size < form.stat().st_size - PAINT_BYTES
        assert external_files(bundle / name) == (WEIGHTS,)
    record = json.loads((bundle / BUNDLE_FILE).read_text(encoding="utf-8"))
    assert (record["format"], record["weights"]) == (3, WEIGHTS)
    assert record["weights_sha256"] == sha256_of(bundle / WEIGHTS)
    for tensor in onnx.load(bundle / MEMBERS[2], load_external_data=False).graph.initializer:
        places = {entry.key: entry.value for entry in tensor.external_data}
        assert (int(places.get("length", 0)) >= MIN_SHARED) == tensor.name.startswith("paint")
        assert int(places.get("offset", 0)) % ALIGNMENT == 0


def test_the_checkpoint_lends_what_it_holds(tmp_path: Path) -> None:
    checkpoint = tmp_path / "c.safetensors"
    metadata = {METADATA_KEY: colour_spec().to_json()}
    safetensors.numpy.save_file({"a": A, "other": np.zeros(7)}, checkpoint, metadata=metadata)
    made_from = {"source_sha256": sha256_of(checkpoint)}
    form = write_painted(tmp_path / "a.onnx", A, B, **made_from)
    folder = make_bundle(tmp_path / "b", [form, checkpoint]).path
    assert external_files(folder / "model.onnx") == ("model.safetensors", WEIGHTS)
    assert (folder / "model.safetensors").read_bytes() == checkpoint.read_bytes()
    assert (folder / WEIGHTS).read_bytes() == B.tobytes()
    assert read_whole(folder / "model.onnx") == form.read_bytes()
    with open_engine(resolve(folder), "onnxruntime", EngineOptions()) as engine:
        assert (engine.run({"image": IMAGE})["mask"] == painted_mask(IMAGE, A, B)).all()


def test_equal_members_give_equal_bytes(forms: list[Path], bundle: Path, tmp_path: Path) -> None:
    again = make_bundle(tmp_path / "other" / "mine", list(reversed(forms))).path
    of_bundles = make_bundle(tmp_path / "third" / "mine", [bundle, again]).path
    assert contents(bundle) == contents(again) == contents(of_bundles)
    zips = [make_bundle(tmp_path / name / "mine.zip", [source]).path for name, source in (("x", bundle), ("y", again))]
    assert zips[0].read_bytes() == zips[1].read_bytes()
    assert contents(unpack(zips[0])) == contents(bundle)


def test_the_same_bytes_come_back(forms: list[Path], bundle: Path, tmp_path: Path) -> None:
    for form, name in zip(forms, MEMBERS, strict=True):
        assert read_whole(bundle / name) == read_whole(form) == form.read_bytes()
        assert model_sha256(bundle / name) == model_sha256(form) == sha256_of(form)
        assert write_whole(tmp_path / "alone" / name, bundle / name) == form.stat().st_size
        assert (tmp_path / "alone" / name).read_bytes() == form.read_bytes()
    copy_whole(bundle / BUNDLE_FILE, tmp_path / "copy.json")  # any other file is copied as it is
    assert (tmp_path / "copy.json").read_bytes() == (bundle / BUNDLE_FILE).read_bytes()


def test_the_shipped_model_as_onnx_itself_reads_it(shipped_model: Path) -> None:
    """Two readers, one of them not ours, agree on every weight of every file."""
    shared = 0
    for path in sorted(shipped_model.glob("*.onnx")):
        shared += bool(external_files(path))
        mine, theirs = onnx.load_from_string(read_whole(path)), onnx.load(path)
        assert [node.name for node in mine.graph.node] == [node.name for node in theirs.graph.node]
        for one, other in zip(mine.graph.initializer, theirs.graph.initializer, strict=True):
            assert (one.name, one.data_type, one.dims) == (other.name, other.data_type, other.dims)
            assert one.raw_data == other.raw_data
        onnx.checker.check_model(mine)
    assert shared


def test_what_is_shipped_is_small(shipped_model: Path) -> None:
    folders = (shipped_model.parent, REPO / "weights")
    sizes = {path: path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 38e6, sizes
    # the INT8 forms of all targets share their weights: besides the checkpoint there are those, and the float16 form's
    for folder in (path.parent for path in sizes if path.name == "bundle.json"):
        assert sizes[folder / "model.weights"] < 0.6 * sizes[folder / "model.safetensors"]


def test_a_bundle_grows_and_shrinks_in_its_own_place(forms: list[Path], bundle: Path, tmp_path: Path) -> None:
    extra = write_painted(tmp_path / "h.onnx", paint(4), precision="fp16", **FAMILY)
    make_bundle(bundle, [bundle, extra])
    assert 4 * PAINT_BYTES <= (bundle / WEIGHTS).stat().st_size <= 4 * (PAINT_BYTES + ALIGNMENT)
    assert read_whole(bundle / "model.onnx") == forms[0].read_bytes()
    plain = tmp_path / "plain.onnx"
    onnx.save(colour_graph(colour_spec()), plain)  # none of its tensors is large
    make_bundle(bundle, [plain], overwrite=True)
    assert sorted(contents(bundle)) == [BUNDLE_FILE, "model.onnx"]


def test_files_of_other_tools_are_taken(tmp_path: Path) -> None:
    """Weights beside a file, however small, as ONNX's own functions write them."""
    model = painted_graph(A, B, **FAMILY)
    whole = model.SerializeToString()
    path = tmp_path / "theirs.onnx"
    onnx.save(model, path, save_as_external_data=True, location="theirs.bin", size_threshold=0)
    assert set(external_files(path)) == {"theirs.bin"}
    assert read_whole(path) == whole
    folder = make_bundle(tmp_path / "b", [path]).path
    assert external_files(folder / "model.onnx") == (WEIGHTS,)
    assert read_whole(folder / "model.onnx") == whole


def test_weights_beside_a_file_that_are_no_initializers(tmp_path: Path) -> None:
    model = painted_graph(A)
    constant = numpy_helper.from_array(A, "w")
    constant.data_location = TensorProto.EXTERNAL
    constant.ClearField("raw_data")
    entry = constant.external_data.add()
    entry.key, entry.value = "location", "w.bin"
    model.graph.node.insert(0, helper.make_node("Constant", [], ["unused"], value=constant))
    (tmp_path / "w.bin").write_bytes(A.tobytes())
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=r"of the tensors that lie in w\.bin some are no initializers"):
        make_bundle(tmp_path / "b", [tmp_path / "x.onnx"])
    assert not list(tmp_path.rglob("*.part"))


def test_what_stands_alone_is_one_onnx_file(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 3 ONNX files \(.*model\.onnx, .*\); name one"):
        write_whole(tmp_path / "x.onnx", bundle)
    before = contents(bundle)
    for there in (bundle, bundle / MEMBERS[1]):  # as where the output's name was forgotten
        with pytest.raises(InputError, match=r"is a (file|folder) already; name a new file"):
            write_whole(there, bundle / "model.onnx")
    assert contents(bundle) == before


# ---- what runs it


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_runtimes_give_what_they_gave(forms: list[Path], bundle: Path, backend: str, need) -> None:
    need(backend)
    for path, layers in ((bundle / "model.onnx", (A, B)), (bundle / f"model.int8.{backend}.onnx", None)):
        expected = layers or {"openvino": (B, C), "onnxruntime": (C, A, B)}[backend]
        with open_engine(resolve(path), backend, EngineOptions()) as engine:
            mask = engine.run({"image": IMAGE})["mask"]
        assert (mask == painted_mask(IMAGE, *expected)).all()
        assert (mask != painted_mask(IMAGE)).any()  # the paint decides


def test_tensorrt_rtx_parses_it(shipped_model: Path, need) -> None:
    need("tensorrt_rtx")
    import tensorrt_rtx as trt

    path = shipped_model / "model.int8.tensorrt.onnx"
    logger = trt.Logger(trt.Logger.ERROR)
    layers = []
    for data, place in ((path.read_bytes(), str(path)), (read_whole(path), None)):
        network = trt.Builder(logger).create_network(0)
        assert trt.OnnxParser(network, logger).parse(data, place)
        layers.append(network.num_layers)
    assert layers[0] == layers[1] > 0


def test_a_segmenter_travels_to_another_process(bundle: Path, need) -> None:
    need("onnxruntime")
    with Segmenter.open(bundle, backend="onnxruntime") as segmenter, pickle.loads(pickle.dumps(segmenter)) as other:
        assert (other.predict(IMAGE[0]).mask == painted_mask(IMAGE, A, B)[0]).all()


def test_triton_gets_a_file_that_stands_alone(forms: list[Path], bundle: Path, tmp_path: Path, need) -> None:
    need("tritonclient")
    from ddsm_deploy.export.triton.repository import deploy

    report = deploy(bundle, tmp_path / "repository")
    assert report.file.read_bytes() == forms[0].read_bytes()
    config = (report.folder / "config.pbtxt").read_text(encoding="utf-8")
    assert sha256_of(forms[0]) in config


# ---- which model it is


def test_equal_graphs_with_other_weights_are_other_models(tmp_path: Path, need) -> None:
    need("onnxruntime")
    folders = [
        make_bundle(tmp_path / str(n) / "m", [write_painted(tmp_path / f"{n}.onnx", layer, **FAMILY)]).path
        for n, layer in enumerate((A, B))
    ]
    files = [folder / "model.onnx" for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert model_sha256(files[0]) != model_sha256(files[1])
    decisions = [facts_of(resolve(folder), EngineOptions())["model"] for folder in folders]
    assert decisions[0] != decisions[1]
    identities = []
    for folder in folders:
        with Segmenter.open(folder, backend="onnxruntime") as segmenter:
            identities.append(identity_of(segmenter))
    assert identities[0].differences(identities[1])
    with pytest.raises(ConfigError, match="are both onnx fp32"):
        make_bundle(tmp_path / "both", folders)


def test_kinship_counts_from_files_inside_and_outside_bundles(forms: list[Path], tmp_path: Path) -> None:
    """A file made from the one that lay in a bundle, or from the same one outside: both name it alike."""
    alone = write_painted(tmp_path / "f.onnx", A, note="no source")
    folder = make_bundle(tmp_path / "b", [alone]).path
    child = write_painted(
        tmp_path / "i.onnx", B, precision="int8", target="openvino", float_sha256=model_sha256(folder / "model.onnx")
    )
    for source in (alone, folder, folder / "model.onnx"):
        assert len(make_bundle(tmp_path / "c", [source, child]).bundle.members) == 2
    with pytest.raises(ArtifactError, match="made from other weights"):
        make_bundle(tmp_path / "d", [write_painted(tmp_path / "g.onnx", B, note="no source"), child])


# ---- what is wrong


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS: dict[str, Callable[[Path], object]] = {
    "damaged (sha256": flip,
    "damaged (sha256 ": lambda path: os.truncate(path, path.stat().st_size - 5),
    "can't be read (No such file": Path.unlink,
}


@pytest.mark.parametrize("said", HARMS)
def test_harmed_weights_are_refused(bundle: Path, tmp_path: Path, said: str) -> None:
    zipped = make_bundle(tmp_path / "z.zip", [bundle]).path
    HARMS[said](bundle / WEIGHTS)
    with pytest.raises(ArtifactError) as caught:
        resolve(bundle)
    assert f"{WEIGHTS}: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)
    place = unpack(zipped)
    HARMS[said](place / WEIGHTS)
    assert resolve(zipped).spec == resolve(place).spec  # the copy in the cache is made anew


def test_another_models_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    """Of the right length, in place of the bundle's own."""
    layers = [write_painted(tmp_path / f"{n}.onnx", *(paint(10 * n + k) for k in range(3)), **FAMILY) for n in (1,)]
    other = make_bundle(tmp_path / "other", layers).path
    assert (other / WEIGHTS).stat().st_size == (bundle / WEIGHTS).stat().st_size
    shutil.copyfile(other / WEIGHTS, bundle / WEIGHTS)
    with pytest.raises(ArtifactError, match=r"model\.weights: damaged \(sha256"):
        resolve(bundle)


def test_a_file_copied_out_alone_says_what_it_lacks(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "robot").mkdir()
    copied = Path(shutil.copy(bundle / "model.onnx", tmp_path / "robot"))
    with pytest.raises(ArtifactError) as caught:
        resolve(copied)
    assert str(caught.value) == (
        f"{copied}: its weights lie in 'model.weights', which is missing beside it; copy that too, or make one file of "
        "both where they are: ddsm bundle WHOLE.onnx model.onnx"
    )
    (tmp_path / "robot" / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes()[:2000])
    with pytest.raises(ArtifactError, match=r"'model\.weights' is cut short \(2000 bytes, \d+ needed\)"):
        resolve(copied)


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    record = json.loads((folder / BUNDLE_FILE).read_text(encoding="utf-8"))
    edit(record)
    (folder / BUNDLE_FILE).write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda r: r.update(weights="../w"), "refers to '../w' outside the bundle; refused"),
        (lambda r: r.update(weights="sub/w"), "outside the bundle; refused"),
        (lambda r: r.update(weights=BUNDLE_FILE), "outside the bundle; refused"),
        (lambda r: r.update(weights=7), "its weights are 7 "),
        (lambda r: r.pop("weights_sha256"), "damaged (sha256"),
        (lambda r: r.update(weights="model.onnx"), "lists model.onnx twice"),
        (lambda r: r.pop("weights"), "its weights lie in model.weights, which no sha256 of the bundle covers; refused"),
    ],
)
def test_a_wrong_record_is_one_line(bundle: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        resolve(edited(bundle, edit))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["../model.weights", "/etc/passwd", "sub/../../x", "other.weights"])
def test_members_refer_to_files_of_the_bundle_alone(bundle: Path, location: str) -> None:
    """Also where bundle.json was made to fit."""
    (bundle.parent / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes())
    (bundle / "other.weights").write_bytes((bundle / WEIGHTS).read_bytes())
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    edited(bundle, lambda r: r["artifacts"][0].update(sha256=sha256_of(path)))
    with pytest.raises(ArtifactError, match=r"outside its folder; refused|which no sha256 of the bundle covers"):
        resolve(bundle)


@pytest.mark.parametrize(("key", "value"), [("offset", "-4"), ("length", "-1"), ("offset", "x"), ("length", "1e3")])
def test_places_that_are_no_numbers(bundle: Path, key: str, value: str) -> None:
    path = bundle / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == key]
    entries[0].value = value
    path.write_bytes(model.SerializeToString())
    for read in (resolve, cut):
        with pytest.raises(ArtifactError, match=r"model\.onnx: damaged \(offset"):
            read(path)
