"""The dependency-free ONNX reader: right on real files, and one clear line on every damaged or foreign one."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import pytest
from colour_graph import colour_graph, colour_spec, write_colour_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ddsm_deploy.errors import ArtifactError
from ddsm_deploy.onnxfile import MAX_FIELDS, read_metadata, read_spec
from ddsm_deploy.spec import METADATA_KEY

SMALL = colour_graph(colour_spec()).SerializeToString()


def test_reads_what_the_onnx_library_reads(tiny_onnx: Path) -> None:
    expected = {entry.key: entry.value for entry in onnx.load(tiny_onnx).metadata_props}
    assert METADATA_KEY in expected
    assert read_metadata(tiny_onnx) == expected


def test_spec_survives(tmp_path: Path) -> None:
    path = write_colour_model(tmp_path / "Strauße 街.onnx", size=(5, 7), channel_order="rgb")
    assert read_spec(path) == colour_spec(size=(5, 7), channel_order="rgb")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"not a model at all, but a text of some length\n" * 9, "not an ONNX file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "not an ONNX file"),
        (b"\x80\x04\x95" + bytes(64), "not an ONNX file"),  # a pickle
        (bytes(64), "not an ONNX file"),
        (SMALL[:-1], "damaged or cut short"),
        (b"\x08\x09", "damaged or cut short"),  # the version alone
    ],
)
def test_refuses_what_is_no_onnx_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_spec(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_metadata(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="can't be read"):
        read_metadata(tmp_path)


def test_refuses_an_onnx_file_that_is_not_ours(tmp_path: Path) -> None:
    model = colour_graph(colour_spec())
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    assert read_metadata(tmp_path / "foreign.onnx") == {}
    with pytest.raises(ArtifactError, match="not made by `ddsm export`"):
        read_spec(tmp_path / "foreign.onnx")


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"format": 99}', '{"format": 1, "classes": 3}', "null"])
def test_refuses_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    model = colour_graph(colour_spec())
    helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ArtifactError, match="record"):
        read_spec(tmp_path / "model.onnx")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    for length in range(len(SMALL)):
        path.write_bytes(SMALL[:length])
        with pytest.raises(ArtifactError):
            read_spec(path)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_give_a_spec_or_one_clear_error(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.onnx"
    path.write_bytes(content)
    try:
        read_spec(path)
    except ArtifactError as exc:
        assert "\n" not in str(exc)


@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_any_bytes_give_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        read_spec(path)


def test_time_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.onnx"
    path.write_bytes(b"\x08\x00" * (20 * MAX_FIELDS))
    start = time.process_time()
    with pytest.raises(ArtifactError, match="fields"):
        read_metadata(path)
    assert time.process_time() - start < 10


def test_depth_is_bounded(tmp_path: Path) -> None:
    inner = helper.make_graph([], "innermost", [], [])
    for _ in range(13):  # a graph in an attribute of a node of a graph: three levels a turn
        inner = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=inner)], "outer", [], [])
    (tmp_path / "deep.onnx").write_bytes(helper.make_model(inner).SerializeToString())
    with pytest.raises(ArtifactError, match="nested deeper"):
        read_metadata(tmp_path / "deep.onnx")


# ---- external data


def _with_external(path: Path, location: str, *, length: int | None = None) -> Path:
    """A colour model one of whose weights lies in another file."""
    model = colour_graph(colour_spec())
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, value in {"location": location, "offset": "0", "length": str(length or 24)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_in_the_folder_is_fine(tmp_path: Path) -> None:
    model = colour_graph(colour_spec())
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > 0
    assert read_spec(tmp_path / "model.onnx").classes == ("red", "green", "blue")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights.bin").write_bytes(bytes(24))
    assert read_spec(_with_external(tmp_path / "deeper.onnx", "sub/weights.bin"))


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", ""]
)
def test_external_data_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    with pytest.raises(ArtifactError, match="outside its folder; refused"):
        read_metadata(_with_external(folder / "model.onnx", location))


def test_external_data_through_a_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(24))
    (folder / "innocent.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(ArtifactError, match="a link that leaves its folder"):
        read_metadata(_with_external(folder / "model.onnx", "innocent.bin"))
    (folder / "circle.bin").symlink_to(folder / "circle.bin")
    with pytest.raises(ArtifactError):
        read_metadata(_with_external(folder / "model.onnx", "circle.bin"))


def test_external_data_that_is_not_all_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        read_metadata(_with_external(tmp_path / "model.onnx", "weights.bin"))
    (tmp_path / "weights.bin").write_bytes(bytes(10))
    with pytest.raises(ArtifactError, match="cut short"):
        read_metadata(_with_external(tmp_path / "model.onnx", "weights.bin"))


def test_external_data_is_found_wherever_a_tensor_can_be(tmp_path: Path) -> None:
    outside = numpy_helper.from_array(onnx.numpy_helper.to_array(colour_graph(colour_spec()).graph.initializer[0]), "w")
    outside.data_location = TensorProto.EXTERNAL
    outside.ClearField("raw_data")
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    constant = helper.make_node("Constant", [], ["w"], value=outside)
    body = helper.make_graph([constant], "body", [], [])
    branch = helper.make_node("If", ["c"], [], then_branch=body, else_branch=helper.make_graph([], "none", [], []))
    function = helper.make_function("local", "f", [], ["w"], [constant], [helper.make_opsetid("", 19)])
    plain = helper.make_graph([], "plain", [], [])
    for number, model in enumerate(
        [
            helper.make_model(helper.make_graph([constant], "g", [], [])),
            helper.make_model(helper.make_graph([branch], "g", [], [])),
            helper.make_model(plain, functions=[function]),
        ]
    ):
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError, match="outside its folder"):
            read_metadata(path)
