"""A served model's URL and record; no server is asked here (see `engines/test_triton.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from colour_graph import colour_spec, write_colour_model

from ddsm_deploy.artifact import resolve
from ddsm_deploy.endpoint import FORM, TIMEOUT, Endpoint, EndpointRecord, is_url, read_endpoint
from ddsm_deploy.engines import open_engine, possible_precisions, samples
from ddsm_deploy.errors import ArtifactError, ConfigError
from ddsm_deploy.packing import make_bundle

RECORD = EndpointRecord(endpoint=Endpoint(host="robot", model="street"), spec=colour_spec(), sampling="gather")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "street.endpoint"
    path.write_text(RECORD.to_json(), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("url", "endpoint", "address"),
    [
        ("triton://robot/street", Endpoint(host="robot", model="street"), "robot:8001"),
        (
            "triton://10.0.0.7:9001/a.b-c_1/12",
            Endpoint(host="10.0.0.7", port=9001, model="a.b-c_1", version="12"),
            None,
        ),
        ("triton://[::1]:9001/street", Endpoint(host="::1", port=9001, model="street"), "[::1]:9001"),
        ("triton://robot/street?timeout=2.5", Endpoint(host="robot", model="street", timeout=2.5), "robot:8001"),
        (
            "triton://robot/street/1?spec=a%20folder/model.onnx&timeout=9",
            Endpoint(host="robot", model="street", version="1", timeout=9, spec="a folder/model.onnx"),
            "robot:8001",
        ),
    ],
)
def test_urls_that_are_read(url: str, endpoint: Endpoint, address: str | None) -> None:
    assert is_url(url)
    found = Endpoint.parse(url)
    assert found == endpoint
    assert address in (None, found.address)
    assert Endpoint.parse(str(found)) == Endpoint.parse(url.replace("spec=a%20folder/model.onnx&", ""))


@pytest.mark.parametrize(
    "url",
    [
        "triton://robot",
        "triton://robot/",
        "triton:///street",
        "triton://robot:0/street",
        "triton://robot:http/street",
        "triton://robot:99999/street",
        "triton://robot/street/latest",
        "triton://robot/street/0",
        "triton://robot/street/1/2",
        "triton://robot/../street",
        "triton://robot/.street",
        "triton://me:secret@robot/street",
        "triton://robot/street#1",
        "triton://robot/street?timeout=soon",
        "triton://robot/street?timeout=0",
        "triton://robot/street?timeout=nan",
        "triton://robot/street?retries=3",
        "triton://robot/street?timeout",
        "triton://robot/street?spec=triton://robot/other",
        "http://robot/street",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse(url)
    assert str(caught.value).startswith(url)
    assert str(caught.value).endswith(f"expected {FORM}")


def test_a_record_is_a_model(file: Path) -> None:
    assert read_endpoint(file) == RECORD
    artifact = resolve(file)
    assert (artifact.name, artifact.spec, artifact.files) == ("street", RECORD.spec, {"endpoint": file})
    assert [part.files for part in artifact.parts()] == [{"endpoint": file}]
    assert possible_precisions(artifact, "triton") == ("fp32",)
    assert possible_precisions(artifact, "onnxruntime") == ()
    assert samples("triton", artifact) == ("gather", "")
    assert read_endpoint(file).endpoint.timeout == TIMEOUT


def test_records_that_are_none(file: Path) -> None:
    whole = json.loads(file.read_text(encoding="utf-8"))
    for text, said in (
        ("", "not an endpoint's record"),
        ("[]", "not an endpoint's record"),
        (json.dumps({**whole, "format": 2}), "format 2; this version reads 1"),
        (json.dumps({**whole, "spec": {}}), "its model record can't be read"),
        (json.dumps({**whole, "url": "http://robot/street"}), "not an endpoint's record"),
        (json.dumps({key: value for key, value in whole.items() if key != "sampling"}), "not an endpoint's record"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError, match=said):
            resolve(file)
    file.unlink()
    with pytest.raises(ArtifactError, match="can't be read"):
        resolve(file)


def test_other_backends_do_not_run_it(file: Path, need) -> None:
    need("onnxruntime")
    with pytest.raises(ArtifactError, match="street has no onnx"):
        open_engine(resolve(file), "onnxruntime")


def test_a_file_is_no_endpoint(tmp_path: Path, need) -> None:
    need("tritonclient")
    model = resolve(write_colour_model(tmp_path / "local.onnx"))
    with pytest.raises(
        ArtifactError, match="local has no endpoint, only onnx fp32; deploy it with `ddsm deploy triton`"
    ):
        open_engine(model, "triton")


def test_no_bundle_takes_it(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="a served model; a bundle takes files that run by themselves"):
        make_bundle(tmp_path / "bundle", [file])
    folder = tmp_path / "made-by-hand"
    folder.mkdir()
    member = {"file": file.name, "kind": "endpoint", "precision": "fp32", "sha256": "0" * 64}
    record = {"format": 2, "name": "sly", "artifacts": [member]}
    (folder / "bundle.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ArtifactError, match="of kind 'endpoint'; expected one of onnx, checkpoint, engine"):
        resolve(folder)
