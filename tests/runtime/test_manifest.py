"""The manifest survives torn lines, full disks, foreign lines and other models, and admits one run at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.runtime.manifest import Finished, Identity, Manifest

ME = Identity(model="lite", sha256="a" * 64, settings={"fit": "stretch", "precision": "fp32"})
OTHER_MODEL = Identity(model="large", sha256="b" * 64, settings=ME.settings)
OTHER_FIT = Identity(model="lite", sha256="a" * 64, settings={"fit": "letterbox", "precision": "fp32"})


def record(source: str) -> dict[str, object]:
    return {"source": source, "name": source.strip("/"), "bytes": 10, "mtime_ns": 20}


def fill(path: Path, *sources: str, identity: Identity = ME) -> None:
    with Manifest(path, identity=identity) as manifest:
        for source in sources:
            manifest.add(record(source))


def finished(path: Path, identity: Identity = ME, *, overwrite: bool = False) -> set[str]:
    with Manifest(path, identity=identity, overwrite=overwrite) as manifest:
        return set(manifest.finished)


def test_records_come_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    odd = os.fsdecode(b"/\xff")
    fill(path, "/a", "/日本", odd)
    with Manifest(path, identity=ME) as manifest:
        assert manifest.finished["/a"] == Finished("a", 10, 20)
        assert set(manifest.finished) == {"/a", "/日本", odd}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"ddsm_manifest": 1, "model": "lite", "sha256": "a" * 64, "settings": ME.settings}
    assert len(lines) == 4, "opening again adds nothing"


def test_the_last_record_of_an_input_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Manifest(path, identity=ME) as manifest:
        manifest.add({"source": "/a", "error": "bad"})
        manifest.add(record("/a"))
        manifest.add(record("/b"))
        manifest.add({"source": "/b", "error": "bad"})
        assert set(manifest.finished) == {"/a"}
    assert finished(path) == {"/a"}


@pytest.mark.parametrize(
    "torn", ['{"source": "/c", "na', '{"source": "/c", "name": "c", "bytes": 10, "mtime_ns": 20}', "\0\0\0"]
)
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    """Also one that happens to be whole but for its newline: it was never finished."""
    path = tmp_path / "m.jsonl"
    fill(path, "/a", "/b")
    with path.open("a") as file:
        file.write(torn)
    with Manifest(path, identity=ME) as manifest:
        manifest.add(record("/d"))
    assert finished(path) >= {"/a", "/b", "/d"}
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"ddsm_mani')
    fill(path, "/a")
    assert finished(path) == {"/a"}
    assert json.loads(path.read_text().splitlines()[0])["ddsm_manifest"] == 1


def test_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, "/a")
    with path.open("a") as file:
        file.write('\n5\n[]\n"text"\nnull\n{}\n{"source": []}\n{"source": "/x"}\nnot json\n{"ddsm_manifest": 1}\n')
    assert finished(path) == {"/a"}


@pytest.mark.parametrize(("other", "said"), [(OTHER_MODEL, "model lite"), (OTHER_FIT, "fit stretch there, letterbox")])
def test_another_model_or_other_settings_stop_with_a_clear_line(tmp_path: Path, other: Identity, said: str) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, "/a")
    with pytest.raises(ConfigError, match=said) as caught:
        Manifest(path, identity=other)
    assert "--overwrite" in str(caught.value)
    assert finished(path) == {"/a"}, "and nothing is changed"
    assert finished(path, other, overwrite=True) == set()
    assert finished(path, other) == set(), "the records of the former model are void from then on"


def test_another_precision_says_how_to_go_on(tmp_path: Path) -> None:
    """As when `ddsm tune` was run between the two halves of a batch."""
    path = tmp_path / "manifest.jsonl"
    Manifest(path, identity=ME).close()
    other = Identity(model="lite", sha256="b" * 64, settings={"fit": "stretch", "precision": "int8"})
    with pytest.raises(ConfigError, match="take another output folder, --precision fp32 to go on, or --overwrite"):
        Manifest(path, identity=other)


def test_overwrite_voids_the_records_and_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    fill(path, "/a", "/b")
    with Manifest(path, identity=ME, overwrite=True) as manifest:
        manifest.add(record("/a"))
    assert finished(path) == {"/a"}, "what the overwriting run did not reach is not taken for finished"


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"ddsm_manifest": 2}\n')
    with pytest.raises(ConfigError, match="newer version"):
        Manifest(path, identity=ME)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Manifest(path, identity=ME), pytest.raises(ConfigError, match="another run is writing there"):
        Manifest(path, identity=ME)
    fill(path, "/a")


def test_what_can_not_be_opened(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(InputError, match=r"m\.jsonl: can't be written"):
        Manifest(tmp_path / "m.jsonl", identity=ME)
