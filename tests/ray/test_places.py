"""Inputs and outputs in other file systems than this machine's: an S3 server's, and one where files are renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.listing import MANIFEST_NAME
from ddsm_deploy.ray.inputs import find_inputs
from ddsm_deploy.ray.options import RayOptions
from ddsm_deploy.ray.places import Place, common_place
from ddsm_deploy.ray.run import segment_on_ray
from ddsm_deploy.runtime.pipeline import open_for_batch, segment_files
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.worker import SegmentOptions

# Ray warns of its own options, and leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server(need) -> Iterator[str]:
    """The query that leads a URI to an S3 server on this machine, which moto is."""
    for module in ("pyarrow", "moto", "flask_cors"):
        need(module)
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"?endpoint_override={host}:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
    running.stop()


@pytest.fixture(scope="module")
def segmenter(colour_onnx: Path) -> Iterator[Segmenter]:
    with open_for_batch(colour_onnx, backend="onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames in two folders, and a damaged one."""
    folder = tmp_path_factory.mktemp("frames")
    for index in range(10):
        path = folder / ("day1" if index % 2 else "day2") / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(index).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        assert cv2.imwrite(str(path), cv2.resize(noise, (96, 64)))
    (folder / "day1" / "damaged.png").write_bytes((folder / "day1" / "1.png").read_bytes()[:100])
    (folder / "day1" / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def bucket(server: str, frames: Path) -> str:
    """`frames` in a bucket, as a URI without the query."""
    from pyarrow.fs import copy_files

    place = Place.of(f"s3://key:secret@drive{server}")
    place.filesystem.create_dir("drive")
    copy_files(str(frames), "drive/frames", destination_filesystem=place.filesystem)
    return "s3://key:secret@drive/frames"


def test_from_bucket_to_bucket(
    cluster: str, server: str, bucket: str, frames: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    segment_files([frames], segmenter, SegmentOptions(output=tmp_path))
    wanted = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in (tmp_path / "masks").rglob("*.png")}
    assert len(wanted) == 10

    out = f"s3://key:secret@drive/frames/out{server}"  # in the sources' own folder, and yet no source of the second run
    options = RayOptions(output=out, workers=1, threads=2, batch=3)
    first = segment_on_ray([bucket + server], segmenter, options)
    second = segment_on_ray([bucket + server], segmenter, options)
    assert (first.output, first.found, first.done) == ("s3://drive/frames/out", 11, 10)
    assert b"secret" not in Place.of(out).below(MANIFEST_NAME).read()
    (failure,) = first.failures
    assert failure.error.startswith("s3://drive/frames/day1/damaged.png: truncated")
    assert (second.found, second.skipped, len(second.failures)) == (11, 10, 1)

    place = Place.of(out)
    assert {name: place.below(name).read() for name in wanted} == wanted
    header, *records = [json.loads(line) for line in place.below(MANIFEST_NAME).read().splitlines()]
    assert header["model"] == "colours"
    made = [record for record in records if "error" not in record]
    assert sorted(record["outputs"][0] for record in made) == sorted(wanted)
    assert all(record["source"].startswith("s3://drive/frames/day") and record["mtime_ns"] for record in made)


def test_what_is_found_in_a_bucket(server: str, bucket: str, frames: Path, tmp_path: Path) -> None:
    """Names are those that the local engine gives."""
    output = Place(str(tmp_path))

    def found(*words: str) -> list[str]:
        return [source.name for source in find_inputs([word + server for word in words], output).sources]

    def locally(*words: str) -> list[str]:
        return [source.name for source in find_inputs([f"{frames}/{word}" for word in words], output).sources]

    for words in (["day1"], ["day1", "day2"], ["day*/[0-4].png"], ["**/3.png"], ["day[2]"], ["day1/1.png"]):
        names = locally(*words)
        assert names
        assert found(*(f"{bucket}/{word}" for word in words)) == names
    for word, told in (("nowhere", "no such file"), ("day1/*.jpg", "no image there"), ("day1/notes*", "no image")):
        with pytest.raises(InputError, match=told):
            found(f"{bucket}/{word}")
    with pytest.raises(ConfigError, match="different file systems"):
        find_inputs([bucket + server, str(frames)], output)


def test_a_bucket_that_is_not_there(server: str, frames: Path, segmenter: Segmenter) -> None:
    options = RayOptions(output=f"s3://key:secret@missing/out{server.replace('=true', '=false')}")
    with pytest.raises(InputError, match="s3://missing/out/ddsm-manifest") as caught:
        segment_on_ray([str(frames)], segmenter, options)
    assert "\n" not in str(caught.value)


def test_secrets_stay_out_of_names(need) -> None:
    need("pyarrow")
    place = Place.of("s3://key:secret@bucket/a/b?region=us-east-1")
    assert str(place.below("c.png")) == "s3://bucket/a/b/c.png"
    with pytest.raises(InputError) as caught:
        Place.of("s3://key:secret@bucket/a?nonsense=1")
    assert "secret" not in str(caught.value)


def test_what_is_no_place(need) -> None:
    need("pyarrow")
    with pytest.raises(InputError, match="no place that pyarrow can reach"):
        Place.of("rtsp://camera/stream")
    assert Place.of("file:///a%20b/c") == Place("/a b/c")
    assert Place.of("frames/*.png").local
    assert common_place([Place("a"), Place("b")]).local


def test_files_are_renamed_where_uploads_are_not_whole_by_nature(tmp_path: Path, need) -> None:
    need("pyarrow")
    from pyarrow.fs import LocalFileSystem

    place = Place(str(tmp_path), "disk", LocalFileSystem())
    for content in (b"first", b"second"):
        place.write({"masks/deep/a.png": content, "masks/b.png": b"b"})
        assert place.below("masks/deep/a.png").read() == content
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == ["masks/b.png", "masks/deep/a.png"]
