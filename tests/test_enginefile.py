"""An engine's record: written and read, and every way in which file and record can fail to be a pair."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from ddsm_deploy.enginefile import (
    EngineRecord,
    Profile,
    TensorRecord,
    misfit,
    read_engine,
    read_engine_spec,
    rebuild_line,
    record_path,
    writing_engine,
)
from ddsm_deploy.errors import ArtifactError, ConfigError, DdsmError, InputError
from ddsm_deploy.spec import ModelSpec

SPEC = ModelSpec(classes=("road", "sky"), precision="fp16").with_provenance(target="tensorrt-rtx")
LENGTH = 4096
# the outline of a real one of 1.7.1.116: magic, its length at byte 16, its version at byte 24
HEADER = b"vtrt" + bytes(4) + bytes([2]) + bytes(7) + LENGTH.to_bytes(8, "little") + bytes([1, 7, 1, 116])
BLOB = HEADER + bytes(range(256)) * 15 + bytes(LENGTH - len(HEADER) - 15 * 256)


def record(blob: bytes = BLOB, **changes: object) -> EngineRecord:
    fields = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "bytes": len(blob),
        "target": "tensorrt-rtx",
        "version": "1.7.1.116",
        "spec": SPEC,
        "onnx_sha256": "0" * 64,
        "graph_sha256": "1" * 64,
        "compute_capabilities": ("86", "89"),
        "gpu": "",
        "inputs": (TensorRecord(name="image", dtype="uint8", shape=(-1, 64, 96, 3)),),
        "outputs": (TensorRecord(name="mask", dtype="uint8", shape=(-1, 64, 96)),),
        "profiles": {"image": Profile(min=(1, 64, 96, 3), opt=(2, 64, 96, 3), max=(4, 64, 96, 3))},
        "layers": {"Conv": {"Half": 3}},
        "options": {"source": "model.onnx", "workspace": 2.0},
        "versions": {"python": "3.11.7"},
        "parity": {"graph": "compared", "changed": "0.06"},
        "notes": ("one", "two"),
    }
    return EngineRecord(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return written(tmp_path / "model.engine", BLOB, record())


def written(path: Path, blob: bytes, of: EngineRecord) -> Path:
    with writing_engine(path) as (engine, beside):
        engine.write_bytes(blob)
        beside.write_text(of.to_json(), encoding="utf-8")
    return path


def test_a_record_comes_back_as_it_went(engine: Path) -> None:
    assert read_engine(engine) == record()
    assert read_engine_spec(engine) == SPEC
    assert sorted(path.name for path in engine.parent.iterdir()) == ["model.engine", "model.engine.json"]


def test_equal_records_are_equal_text() -> None:
    again = record(options={"workspace": 2.0, "source": "model.onnx"}, versions={"python": "3.11.7"})
    assert again.to_json() == record().to_json()
    assert json.loads(record().to_json())["spec"]["classes"] == ["road", "sky"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda blob: blob[:-100], "cut short (3996 bytes, its record says 4096)"),
        (lambda blob: blob + b"more", "not the engine of its record (4100 bytes"),
        (lambda blob: blob[:2000] + b"\xff" + blob[2001:], "damaged (sha256 "),
        (
            lambda blob: b"ptrt" + blob[4:],
            "damaged (it begins with b'ptrt', a TensorRT-RTX engine begins with b'vtrt')",
        ),
        (lambda blob: blob[:16] + bytes([7]) + blob[17:], "damaged (its header speaks of 4103 bytes, it has 4096)"),
    ],
)
def test_damage_is_told_with_the_command_that_mends_it(engine: Path, damage, said: str) -> None:
    engine.write_bytes(damage(BLOB))
    with pytest.raises(ArtifactError) as caught:
        read_engine(engine)
    assert said in str(caught.value)
    assert str(caught.value).endswith(
        "ddsm build model.onnx --target tensorrt-rtx --precision fp16 --compute-capability 86 --compute-capability 89 "
        "--profile 1x64x96:2x64x96:4x64x96 -o model.engine"
    )


def test_a_file_without_a_record_says_what_it_is(engine: Path, tmp_path: Path) -> None:
    record_path(engine).unlink()
    with pytest.raises(
        ArtifactError, match=r"an engine of TensorRT-RTX 1\.7\.1\.116, but its record model\.engine\.json"
    ):
        read_engine(engine)
    engine.write_bytes(b"something")
    with pytest.raises(ArtifactError, match="an engine file, but its record"):
        read_engine_spec(engine)
    with pytest.raises(ArtifactError, match="no such engine file"):
        read_engine(tmp_path / "other.engine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not an engine's record"),
        ("[]", "not an engine's record"),
        ("{}", "not an engine's record"),
        ('{"format": 99}', "format 99; this version reads 1; update ddsm-deploy"),
        (record().to_json().replace("tensorrt-rtx", "coreml"), "target is 'coreml'"),
        (record().to_json().replace('"bytes"', '"octets"'), "octets"),
        (record().to_json().replace('"min"', '"least"'), "least"),
        ("[" * 100_000, "not an engine's record"),
    ],
)
def test_a_foreign_record_is_refused(engine: Path, text: str, said: str) -> None:
    record_path(engine).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError) as caught:
        read_engine(engine)
    assert said in str(caught.value)


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path, engine: Path) -> None:
    with pytest.raises(ZeroDivisionError), writing_engine(engine) as (temporary, _):
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert read_engine(engine) == record()  # the one from before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.engine", "model.engine.json"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't be written"), writing_engine(tmp_path / "file" / "x.engine"):
        raise AssertionError("the block must not be reached")


@pytest.mark.parametrize(
    ("changes", "here", "said"),
    [
        ({}, {}, ""),
        ({}, {"compute_capability": "89"}, ""),
        ({}, {"backend": "tensorrt"}, "was built for tensorrt-rtx, not for tensorrt"),
        ({}, {"version": "1.8.0.1"}, "was built by tensorrt-rtx 1.7.1.116, and 1.8.0.1 is installed"),
        ({}, {"compute_capability": "120"}, "compute capability 86, 89, and the GPU here has 120"),
        ({"compute_capabilities": ()}, {"compute_capability": "120"}, ""),
    ],
)
def test_why_an_engine_does_not_fit(changes: dict, here: dict, said: str) -> None:
    given = {"backend": "tensorrt-rtx", "version": "1.7.1.116", "compute_capability": None, **here}
    problem = misfit(record(**changes), Path("model.engine"), **given)
    assert problem.startswith("model.engine was built") is bool(said)
    assert said in problem
    assert ("ddsm build model.onnx --target" in problem) is bool(said)
    if "compute_capability" in here and said:
        assert "--compute-capability 120" in problem


@pytest.mark.parametrize(
    ("options", "version", "compute_capability", "fits"),
    [
        ({}, "10.13.3.9", "86", True),
        ({}, "10.13.4.0", "86", False),
        ({}, "10.13.3.9", "89", False),
        ({"version_compatible": True}, "10.14.1.48", "86", True),
        ({"version_compatible": True}, "10.12.0.36", "86", False),  # an older one
        ({"version_compatible": True}, "11.1.0.1", "86", False),  # another major version
        ({"hardware_compatible": True}, "10.13.3.9", "120", True),
        ({"hardware_compatible": True}, "10.13.3.9", "75", False),  # Turing is older than Ampere
    ],
)
def test_what_tensorrt_itself_allows(options: dict, version: str, compute_capability: str, fits: bool) -> None:
    own = record(target="tensorrt", version="10.13.3.9", compute_capabilities=("86",), options=options)
    problem = misfit(own, Path("e"), backend="tensorrt", version=version, compute_capability=compute_capability)
    assert (problem == "") is fits


def test_how_an_engine_samples() -> None:
    fields = json.loads(record(sampling="fused").to_json())
    assert EngineRecord.from_json(json.dumps(fields), source="x").sampling == "fused"
    del fields["sampling"]  # as older versions wrote it
    assert EngineRecord.from_json(json.dumps(fields), source="x").sampling == ""
    own = record(target="tensorrt", profiles={}, options={}, sampling="fused")
    flags = "--target tensorrt --precision fp16 --sampling"
    assert rebuild_line(own, Path("b.engine")) == f"ddsm build MODEL {flags} fused -o b.engine"
    assert rebuild_line(own, Path("b.engine"), sampling="portable") == f"ddsm build MODEL {flags} portable -o b.engine"
    assert "--sampling" not in rebuild_line(own, Path("b.engine"), target="tensorrt-rtx")


def test_the_rebuild_line_names_what_the_target_has() -> None:
    own = dataclasses.replace(record(), target="tensorrt", profiles={}, options={})
    assert rebuild_line(own, Path("a/b.engine")) == "ddsm build MODEL --target tensorrt --precision fp16 -o b.engine"


@pytest.mark.parametrize(
    ("low", "best", "high"),
    [((0, 1), (1, 1), (1, 1)), ((2, 1), (1, 1), (3, 1)), ((1, 1), (4, 1), (3, 1)), ((1,), (1, 1), (1, 1))],
)
def test_a_profile_grows(low: tuple, best: tuple, high: tuple) -> None:
    with pytest.raises(DdsmError, match="profile") as caught:
        Profile(min=low, opt=best, max=high)
    assert isinstance(caught.value, ConfigError)
