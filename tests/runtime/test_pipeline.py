"""Folders of images become folders of masks: right, in order, resumable, in bounded memory, whatever is among them."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.listing import JOURNAL_NAME, MANIFEST_NAME
from ddsm_deploy.runtime.outputs import Products
from ddsm_deploy.runtime.pipeline import SegmentSummary, open_for_batch, segment_files
from ddsm_deploy.runtime.segmenter import Segmenter
from ddsm_deploy.runtime.worker import SegmentOptions

SIZE = (64, 96)
ALL = Products(color=True, overlay=True, confidence=True, polygons="coco")


@pytest.fixture(scope="module")
def segmenter(colour_onnx: Path) -> Iterator[Segmenter]:
    with open_for_batch(colour_onnx, backend="onnxruntime", outputs=("mask", "confidence")) as opened:
        yield opened


def noise(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Blocks of 8×8 pixels in random colours: regions rather than specks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-size[0] // 8), -(-size[1] // 8), 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]


def write_images(folder: Path, count: int, *, size: tuple[int, int] = SIZE) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:04}.png" for index in range(count)]
    for index, path in enumerate(paths):
        assert cv2.imwrite(str(path), noise(index, size))
    return paths


def expected_mask(image: np.ndarray) -> np.ndarray:
    """`colour_graph`'s answer by its definition: the strongest of red, green, blue, the first of equals."""
    return image[:, :, ::-1].argmax(axis=2)


def read_mask(path: Path) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert mask is not None, path
    return mask


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / MANIFEST_NAME).read_text().splitlines()]


def files(output: Path) -> set[str]:
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


def run(source: Path, output: Path, segmenter: Segmenter, **options: object) -> SegmentSummary:
    return segment_files([source], segmenter, SegmentOptions(output=output, **options))


def test_masks_are_right_and_named_by_their_inputs(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 5)
    write_images(tmp_path / "in" / "deep", 2)
    summary = run(tmp_path / "in", tmp_path / "out", segmenter)
    assert (summary.found, summary.done, summary.skipped, summary.failures) == (7, 7, 0, [])
    assert summary.complete
    assert summary.fps > 0
    for path in (tmp_path / "in").rglob("*.png"):
        mask = read_mask(tmp_path / "out" / "masks" / path.relative_to(tmp_path / "in"))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, expected_mask(cv2.imread(str(path))))


def test_all_products_and_their_records(tmp_path: Path, segmenter: Segmenter) -> None:
    (path,) = write_images(tmp_path / "in", 1)
    run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL)
    made = ["color/0000.png", "overlay/0000.jpg", "confidence/0000.png", "polygons/0000.coco.json", "masks/0000.png"]
    assert files(tmp_path / "out") == {*made, MANIFEST_NAME, "annotations.json"}
    assert np.array_equal(read_mask(tmp_path / "out/confidence/0000.png"), noise(0).max(axis=2))
    header, record = records(tmp_path / "out")
    assert header["settings"] == {"precision": "fp32", "fit": "stretch", "size": "64x96"}
    assert record["source"] == str(path)
    assert record["outputs"] == made
    assert record["size"] == list(SIZE)
    assert record["model"] == header["sha256"]
    assert (record["backend"], record["precision"], record["sampling"]) == ("onnxruntime", "fp32", "portable")
    assert set(record["ms"]) == {"decode", "infer", "encode"}


@pytest.mark.parametrize("size", [(1, 1), (37, 91), (360, 480), (300, 20)])
def test_masks_have_their_images_size(tmp_path: Path, segmenter: Segmenter, size: tuple[int, int]) -> None:
    write_images(tmp_path / "in", 1, size=size)
    run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL)
    for product in ("masks/0000.png", "color/0000.png", "overlay/0000.jpg", "confidence/0000.png"):
        assert read_mask(tmp_path / "out" / product).shape[:2] == size


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_manifest_keeps_the_order_of_the_inputs(tmp_path: Path, segmenter: Segmenter, workers: int) -> None:
    """The first is large and slow, the others overtake it."""
    write_images(tmp_path / "in", 20)
    cv2.imwrite(str(tmp_path / "in" / "0000.png"), noise(0, (1500, 2000)))
    seen: list[int] = []
    options = SegmentOptions(output=tmp_path / "out", workers=workers)
    segment_files([tmp_path / "in"], segmenter, options, progress=lambda summary: seen.append(summary.done))
    assert seen == list(range(21))
    assert [Path(r["source"]).name for r in records(tmp_path / "out")[1:]] == [f"{i:04}.png" for i in range(20)]


def test_one_bad_image_never_stops_the_rest(tmp_path: Path, segmenter: Segmenter) -> None:
    paths = write_images(tmp_path / "in", 8)
    paths[2].write_bytes(b"")
    paths[5].write_bytes(paths[5].read_bytes()[:300])
    summary = run(tmp_path / "in", tmp_path / "out", segmenter)
    assert (summary.done, len(summary.failures), summary.complete) == (6, 2, False)
    assert [failure.source for failure in summary.failures] == [str(paths[2]), str(paths[5])]
    assert "empty" in summary.failures[0].error
    assert "truncated" in summary.failures[1].error
    assert len(files(tmp_path / "out")) == 7
    assert [r["source"] for r in records(tmp_path / "out")[1:] if "error" in r] == [str(paths[2]), str(paths[5])]

    cv2.imwrite(str(paths[2]), noise(2))
    again = run(tmp_path / "in", tmp_path / "out", segmenter)
    assert (again.done, again.skipped, len(again.failures)) == (1, 6, 1), "failures are tried again"


def test_finished_inputs_are_skipped_and_changed_ones_are_not(tmp_path: Path, segmenter: Segmenter) -> None:
    paths = write_images(tmp_path / "in", 6)
    out = tmp_path / "out"
    run(tmp_path / "in", out, segmenter)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    again = run(tmp_path / "in", out, segmenter)
    assert (again.done, again.skipped, again.complete) == (0, 6, True)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before

    (out / "masks/0001.png").unlink()
    cv2.imwrite(str(paths[3]), noise(33))
    os.utime(paths[4], ns=(1, 1))
    again = run(tmp_path / "in", out, segmenter)
    assert (again.done, again.skipped) == (3, 3)
    assert np.array_equal(read_mask(out / "masks/0003.png"), expected_mask(noise(33)))

    again = run(tmp_path / "in", out, segmenter, products=Products(overlay=True))
    assert (again.done, again.skipped) == (6, 0), "a further product needs the image again"
    again = run(tmp_path / "in", out, segmenter, overwrite=True)
    assert (again.done, again.skipped) == (6, 0)


def test_a_run_without_its_manifest_makes_all_anew(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out", segmenter)
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    (tmp_path / "out/masks/0001.png").write_bytes(b"half a fi")
    assert run(tmp_path / "in", tmp_path / "out", segmenter, overwrite=True).done == 2
    assert np.array_equal(read_mask(tmp_path / "out/masks/0001.png"), expected_mask(noise(1)))


def test_another_model_or_fit_needs_overwrite(tmp_path: Path, segmenter: Segmenter, colour_onnx: Path) -> None:
    from colour_graph import write_colour_model

    write_images(tmp_path / "in", 2)
    run(tmp_path / "in", tmp_path / "out", segmenter)
    other = write_colour_model(tmp_path / "other.onnx", size=(32, 48))
    with open_for_batch(other, backend="onnxruntime") as second:
        with pytest.raises(ConfigError, match=r"model colours .* there, .* wanted; size 64x96 there, 32x48 wanted"):
            run(tmp_path / "in", tmp_path / "out", second)
        assert run(tmp_path / "in", tmp_path / "out", second, overwrite=True).done == 2
        assert run(tmp_path / "in", tmp_path / "out", second).skipped == 2
    with (
        open_for_batch(other, backend="onnxruntime", fit="letterbox") as third,
        pytest.raises(ConfigError, match="fit stretch there, letterbox wanted"),
    ):
        run(tmp_path / "in", tmp_path / "out", third)


def test_outputs_of_other_sources_are_not_written_over(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "day1", 2)
    write_images(tmp_path / "day2", 2)
    run(tmp_path / "day1", tmp_path / "out", segmenter)
    with pytest.raises(ConfigError, match=r"holds the outputs of .*day1.*0000\.png under the name that .*day2"):
        run(tmp_path / "day2", tmp_path / "out", segmenter)
    days = [tmp_path / "day1", tmp_path / "day2"]
    summary = segment_files(days, segmenter, SegmentOptions(output=tmp_path / "out"))
    assert summary.done == 4
    assert (tmp_path / "out/masks/day2/0001.png").exists()


def test_masks_of_a_stream_are_not_written_over(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL_NAME).touch()
    with pytest.raises(ConfigError, match="holds the masks of a stream"):
        segment_files([tmp_path / "in"], segmenter, SegmentOptions(output=tmp_path / "out", overwrite=True))


def test_inputs_that_would_share_an_output_both_get_one(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), noise(1))
    cv2.imwrite(str(tmp_path / "in/a.bmp"), noise(2))
    assert run(tmp_path / "in", tmp_path / "out", segmenter).done == 2
    assert np.array_equal(read_mask(tmp_path / "out/masks/a.png.png"), expected_mask(noise(1)))
    assert np.array_equal(read_mask(tmp_path / "out/masks/a.bmp.png"), expected_mask(noise(2)))
    assert run(tmp_path / "in", tmp_path / "out", segmenter).skipped == 2


def test_very_long_and_odd_names(tmp_path: Path, segmenter: Segmenter) -> None:
    (tmp_path / "in").mkdir()
    data = cv2.imencode(".png", noise(3))[1].tobytes()
    for name in ("n" * 251 + ".png", "é日本🚗.png", os.fsdecode(b"\xff.png"), "a\nb.png", " .png"):
        (tmp_path / "in" / name).write_bytes(data)
    assert run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL).done == 5
    assert run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL).skipped == 5


def test_left_overs_of_a_killed_run_go_away(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 1)
    left = tmp_path / "out/masks/deep/.ddsm-4711-3.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    run(tmp_path / "in", tmp_path / "out", segmenter)
    assert files(tmp_path / "out") == {"masks/0000.png", MANIFEST_NAME}


def test_a_run_asked_to_stop_can_be_resumed_and_ends_as_if_it_never_had(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 40)
    stop = threading.Event()

    def after_five(summary: SegmentSummary) -> None:
        if summary.done == 5:
            stop.set()

    options = SegmentOptions(output=tmp_path / "out", products=ALL, workers=2)
    first = segment_files([tmp_path / "in"], segmenter, options, progress=after_five, stop=stop)
    assert first.interrupted
    assert 5 <= first.done < 40
    assert len(list((tmp_path / "out/masks").iterdir())) == first.done == len(records(tmp_path / "out")) - 1
    assert len(json.loads((tmp_path / "out/annotations.json").read_text())["images"]) == first.done

    second = segment_files([tmp_path / "in"], segmenter, options)
    assert (second.skipped, second.done, second.interrupted) == (first.done, 40 - first.done, False)
    run(tmp_path / "in", tmp_path / "whole", segmenter, products=ALL)
    for file in files(tmp_path / "whole") - {MANIFEST_NAME}:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_coco_leaves_out_what_is_not_finished(tmp_path: Path, segmenter: Segmenter) -> None:
    paths = write_images(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL)
    paths[1].write_bytes(b"now it is damaged")
    run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL)
    document = json.loads((tmp_path / "out/annotations.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["0000.png", "0002.png"]
    (tmp_path / "out/polygons/0002.coco.json").write_text("{")
    summary = run(tmp_path / "in", tmp_path / "out", segmenter, products=ALL)
    assert "a part is damaged" in summary.stopped
    assert not list((tmp_path / "out").rglob("*.part"))


def test_memory_is_bounded(tmp_path: Path, segmenter: Segmenter) -> None:
    """80 frames of 1.7 MB, yet never more than a few at once: an image and what is made of it, for each worker."""
    size = (600, 960)
    (first,) = write_images(tmp_path / "in", 1, size=size)
    for index in range(1, 80):
        (first.parent / f"{index:04}.png").symlink_to(first)
    frame = size[0] * size[1] * 3
    tracemalloc.start()
    try:
        assert run(tmp_path / "in", tmp_path / "out", segmenter, workers=2).done == 80
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frame < peak < 8 * frame


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_every_backend_and_number_of_workers_makes_the_same_masks(
    tmp_path: Path, colour_onnx: Path, need, backend: str
) -> None:
    if backend != "auto":
        need(backend)
    write_images(tmp_path / "in", 12)
    for workers in (1, 3):
        with open_for_batch(colour_onnx, backend=backend, workers=workers) as opened:
            out = tmp_path / f"{workers}"
            assert run(tmp_path / "in", out, opened, workers=workers).done == 12
            assert (opened.backend in opened.choice) or backend == "auto"
        for index in range(12):
            assert np.array_equal(read_mask(out / f"masks/{index:04}.png"), expected_mask(noise(index)))


def test_a_model_without_confidence(tmp_path: Path, colour_onnx: Path) -> None:
    write_images(tmp_path / "in", 1)
    with open_for_batch(colour_onnx, backend="onnxruntime") as opened, pytest.raises(ConfigError, match="confidence"):
        run(tmp_path / "in", tmp_path / "out", opened, products=Products(confidence=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_an_output_folder_that_can_not_be(tmp_path: Path, segmenter: Segmenter, output: str) -> None:
    write_images(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"{output}: can't be the output folder"):
        run(tmp_path / "in", tmp_path / output, segmenter)


def test_one_output_that_can_not_be_written_fails_alone(tmp_path: Path, segmenter: Segmenter) -> None:
    write_images(tmp_path / "in", 3)
    (tmp_path / "out/masks/0001.png").mkdir(parents=True)
    summary = run(tmp_path / "in", tmp_path / "out", segmenter)
    assert (summary.done, summary.stopped) == (2, "")
    assert "0001.png: its outputs can't be written" in summary.failures[0].error
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.fixture
def small_disk(tmp_path: Path, missing) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        missing("tmpfs", "mounting one is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_stops_cleanly_and_the_run_goes_on_with_more_room(
    tmp_path: Path, segmenter: Segmenter, small_disk: Path
) -> None:
    write_images(tmp_path / "in", 120)
    products = Products(color=True)
    first = run(tmp_path / "in", small_disk / "out", segmenter, products=products)
    assert "No space left on device" in first.stopped
    assert 0 < first.done < 120
    assert not list(small_disk.rglob("*.part"))
    masks = sorted((small_disk / "out/masks").iterdir())
    for path in masks:
        assert read_mask(path).shape == SIZE, "nothing half-written"
    ends = (small_disk / "out" / MANIFEST_NAME).read_text()
    assert ends.endswith("\n")
    assert len([r for r in records(small_disk / "out")[1:] if "error" not in r]) == first.done

    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    second = run(tmp_path / "in", small_disk / "out", segmenter, products=products)
    assert second.complete
    assert second.skipped == first.done


def test_options_are_checked(tmp_path: Path) -> None:
    for wrong in ({"workers": 0}, {"max_pixels": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            SegmentOptions(output=tmp_path, **wrong)


def test_no_output_takes_an_inputs_place(tmp_path: Path, segmenter: Segmenter) -> None:
    """As of RGB-D data, whose pictures lie in a folder `color`."""
    images = write_images(tmp_path / "color", 3)
    before = [path.read_bytes() for path in images]
    for overwrite in (False, True):
        options = SegmentOptions(output=tmp_path, products=ALL, overwrite=overwrite)
        with pytest.raises(ConfigError, match=r"color/0000\.png is a source, and would be written over"):
            segment_files([str(tmp_path / "color")], segmenter, options)
    assert [path.read_bytes() for path in images] == before
    options = SegmentOptions(output=tmp_path, products=Products())  # masks are in nobody's way
    assert segment_files([str(tmp_path / "color")], segmenter, options).done == 3


def test_files_that_no_run_has_made_stay(tmp_path: Path, segmenter: Segmenter) -> None:
    """As the labels of a data set."""
    write_images(tmp_path / "images", 2)
    labels = write_images(tmp_path / "masks", 2)
    before = [path.read_bytes() for path in labels]
    with pytest.raises(ConfigError, match=r"masks/0000\.png is there already, and no record tells"):
        segment_files([str(tmp_path / "images")], segmenter, SegmentOptions(output=tmp_path))
    assert [path.read_bytes() for path in labels] == before
    assert (
        segment_files([str(tmp_path / "images")], segmenter, SegmentOptions(output=tmp_path, overwrite=True)).done == 2
    )
