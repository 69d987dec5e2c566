"""Data sets on disk: the three layouts, their label tables, and every way in which they can be wrong."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from ddsm_deploy.datasets import IGNORE, Dataset, camvid_classes, cityscapes_classes, open_dataset, read_class_file
from ddsm_deploy.errors import ConfigError, DdsmError, InputError

# labelId -> trainId of every class that Cityscapes evaluates; the other ids are 255. From the table `labels` in
# cityscapesscripts/helpers/labels.py of the data set's own tools.
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9,
    23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip


def write_image(path: Path, *, height: int = 6, width: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((height, width, 3), 90, dtype=np.uint8))
    return path


def write_labels(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(labels).save(path)
    return path


def write_classes(path: Path, entries: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def refused(action: Callable[[], object], kind: type[DdsmError] = InputError) -> str:
    """The message of the error that `action` raises, which must be one line."""
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)  # every label value once


class TestCamvid:
    def tree(self, root: Path) -> Path:
        for name in ("0001TP_b", "0001TP_a", "sub/0002"):
            write_image(root / "val" / f"{name}.png")
            write_labels(root / "valannot" / f"{name}.png", RAMP)
        return root

    def test_layout(self, tmp_path: Path) -> None:
        dataset = open_dataset("camvid", self.tree(tmp_path), "val")
        assert (dataset.name, dataset.split) == ("camvid", "val")
        assert [s.image for s in dataset.samples] == [
            tmp_path / "val" / name for name in ("0001TP_a.png", "0001TP_b.png", "sub/0002.png")
        ]
        assert dataset.samples[2].labels == tmp_path / "valannot" / "sub" / "0002.png"

    def test_eleven_classes_and_void_above(self, tmp_path: Path) -> None:
        labels = open_dataset("camvid", self.tree(tmp_path), "val").labels(0)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels.ravel(), [*range(11), *[IGNORE] * 245])

    def test_every_name_and_colour_is_distinct(self) -> None:
        classes = camvid_classes()
        assert len(set(classes.names)) == len(set(classes.palette)) == 11

    @pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
    def test_the_real_one(self, camvid: Path, split: str, count: int) -> None:
        dataset = open_dataset("camvid", camvid, split)
        assert len(dataset.samples) == count
        assert all(s.image.name == s.labels.name for s in dataset.samples)
        for index in range(0, count, 50):
            labels = dataset.labels(index)
            assert labels.shape == (360, 480)
            assert set(np.unique(labels)) <= {*range(11), IGNORE}

    def test_a_missing_split(self, tmp_path: Path) -> None:
        assert f"{tmp_path}/vall: no such folder" in refused(
            lambda: open_dataset("camvid", self.tree(tmp_path), "vall")
        )

    def test_a_missing_label_folder(self, tmp_path: Path) -> None:
        write_image(tmp_path / "val" / "a.png")
        assert "valannot: no such folder" in refused(lambda: open_dataset("camvid", tmp_path, "val"))

    def test_a_missing_label(self, tmp_path: Path) -> None:
        image = write_image(self.tree(tmp_path) / "val" / "z.jpg")
        message = refused(lambda: open_dataset("camvid", tmp_path, "val"))
        assert message == f"{image}: no label map at {tmp_path}/valannot/z.png"

    def test_an_empty_split(self, tmp_path: Path) -> None:
        (tmp_path / "val" / "not-an-image.png").mkdir(parents=True)
        (tmp_path / "valannot").mkdir()
        (tmp_path / "val" / "notes.txt").write_text("no image")
        assert "no image in split 'val' of a camvid data set" in refused(
            lambda: open_dataset("camvid", tmp_path, "val")
        )


class TestCityscapes:
    def tree(self, root: Path) -> Path:
        for city in ("ulm", "bonn"):
            for frame in ("000001_000019", "000000_000019"):
                stem = f"{city}_{frame}"
                write_image(root / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png")
                write_labels(root / "gtFine" / "val" / city / f"{stem}_gtFine_labelIds.png", RAMP)
                write_labels(root / "gtFine" / "val" / city / f"{stem}_gtFine_instanceIds.png", RAMP)
        return root

    def test_layout(self, tmp_path: Path) -> None:
        dataset = open_dataset("cityscapes", self.tree(tmp_path), "val")
        assert [s.image.name for s in dataset.samples] == [
            f"{city}_{frame}_leftImg8bit.png"
            for city in ("bonn", "ulm")
            for frame in ("000000_000019", "000001_000019")
        ]
        assert dataset.samples[3].labels == tmp_path / "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png"

    def test_label_ids_become_train_ids(self, tmp_path: Path) -> None:
        labels = open_dataset("cityscapes", self.tree(tmp_path), "val").labels(0)
        expected = [CITYSCAPES_TRAIN_IDS.get(raw, IGNORE) for raw in range(256)]
        np.testing.assert_array_equal(labels.ravel(), expected)

    def test_names_and_colours_by_train_id(self) -> None:
        classes = cityscapes_classes()
        assert len(classes.names) == 19
        # from the same table, by train id
        for train_id, name, colour in [
            (0, "road", (128, 64, 128)),
            (5, "pole", (153, 153, 153)),
            (10, "sky", (70, 130, 180)),
            (13, "car", (0, 0, 142)),
            (18, "bicycle", (119, 11, 32)),
        ]:
            assert (classes.names[train_id], classes.palette[train_id]) == (name, colour)

    def test_a_missing_label(self, tmp_path: Path) -> None:
        gone = self.tree(tmp_path) / "gtFine/val/bonn/bonn_000001_000019_gtFine_labelIds.png"
        gone.unlink()
        assert f"no label map at {gone}" in refused(lambda: open_dataset("cityscapes", tmp_path, "val"))

    def test_a_missing_split_and_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "leftImg8bit" / "val").mkdir(parents=True)
        assert "no image in split 'val'" in refused(lambda: open_dataset("cityscapes", tmp_path, "val"))
        assert "leftImg8bit/test: no such folder" in refused(lambda: open_dataset("cityscapes", tmp_path, "test"))


class TestFolder:
    CLASSES = (
        {"name": "ground", "color": [1, 2, 3], "value": 7},
        {"name": "thing", "value": 200},
        {"name": "sky", "color": [255, 0, 255], "value": 0},
    )

    def tree(self, base: Path, root: Path) -> Dataset:
        write_classes(root / "classes.json", self.CLASSES)
        for suffix in (".jpg", ".PNG", ".bmp"):
            write_image(base / "images" / f"frame{suffix[1:].lower()}{suffix}")
            write_labels(base / "labels" / f"frame{suffix[1:].lower()}.png", RAMP)
        return open_dataset("folder", root, "val")

    def test_without_splits(self, tmp_path: Path) -> None:
        dataset = self.tree(tmp_path, tmp_path)
        assert [s.image.suffix for s in dataset.samples] == [".bmp", ".jpg", ".PNG"]
        assert dataset.classes.names == ("ground", "thing", "sky")
        assert dataset.classes.palette[0] == (1, 2, 3)
        assert len(set(dataset.classes.palette)) == 3

    def test_with_splits(self, tmp_path: Path) -> None:
        dataset = self.tree(tmp_path / "val", tmp_path)
        assert all(s.image.parent == tmp_path / "val" / "images" for s in dataset.samples)
        message = refused(lambda: open_dataset("folder", tmp_path, "test"))
        assert message == f"{tmp_path}: neither test/images nor images is a folder there"

    def test_values_become_ids(self, tmp_path: Path) -> None:
        labels = self.tree(tmp_path, tmp_path).labels(0).ravel()
        expected = np.full(256, IGNORE)
        expected[[7, 200, 0]] = [0, 1, 2]
        np.testing.assert_array_equal(labels, expected)

    def test_values_are_places_in_the_list_when_left_out(self, tmp_path: Path) -> None:
        classes = read_class_file(write_classes(tmp_path / "c.json", [{"name": "a"}, {"name": "b"}]))
        np.testing.assert_array_equal(classes.from_raw, [0, 1, *[IGNORE] * 254])

    def test_unicode_names(self, tmp_path: Path) -> None:
        root = tmp_path / "Straße 道"
        write_classes(root / "classes.json", [{"name": "Straße"}])
        write_image(root / "images" / "bild_ü.png")
        write_labels(root / "labels" / "bild_ü.png", np.zeros((6, 8), np.uint8))
        dataset = open_dataset("folder", root, "val")
        assert dataset.classes.names == ("Straße",)
        assert dataset.labels(0).max() == 0

    def test_splits_joined(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "classes.json", self.CLASSES)
        for split in ("train", "val"):
            write_image(tmp_path / split / "images" / f"{split}.png")
            write_labels(tmp_path / split / "labels" / f"{split}.png", RAMP)
        both = open_dataset("folder", tmp_path, "val+train")
        assert both.split == "val+train"
        assert [sample.image.name for sample in both.samples] == ["val.png", "train.png"]
        with pytest.raises(ConfigError, match="names one split twice"):
            open_dataset("folder", tmp_path, "val+train+val")

    @pytest.mark.parametrize("bits", [4, 8])
    def test_palette_labels_keep_their_indices(self, tmp_path: Path, bits: int) -> None:
        write_classes(tmp_path / "classes.json", [{"name": f"c{i}"} for i in range(12)])
        write_image(tmp_path / "images" / "a.png")
        ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
        picture = PIL.Image.fromarray(ids)
        picture.putpalette([value for i in range(16) for value in (255 - i, 0, 7)])  # colours unlike the indices
        (tmp_path / "labels").mkdir()
        picture.save(tmp_path / "labels" / "a.png", bits=bits)
        np.testing.assert_array_equal(open_dataset("folder", tmp_path, "val").labels(0), ids)

    def test_grey_labels_of_four_bits_are_refused(self, tmp_path: Path) -> None:
        # Pillow reads id 1 of such a file as 17; it can't write one, so the PNG is put together here
        dataset = self.tree(tmp_path, tmp_path)
        rows = b"".join(b"\0" + bytes([0x01, 0x23]) for _ in range(2))
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 4, 2, 4, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
        dataset.samples[0].labels.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        )
        assert "a grey label map of less than 8 bits a pixel" in refused(lambda: dataset.labels(0))

    def test_colour_labels_are_refused(self, tmp_path: Path) -> None:
        dataset = self.tree(tmp_path, tmp_path)
        write_image(dataset.samples[0].labels)
        assert "a label map is an 8-bit grey or palette image, this one is RGB" in refused(lambda: dataset.labels(0))

    def test_damaged_labels_are_refused(self, tmp_path: Path) -> None:
        dataset = self.tree(tmp_path, tmp_path)
        whole = dataset.samples[0].labels.read_bytes()
        for damage in (b"", b"not an image", whole[: len(whole) // 2]):
            dataset.samples[0].labels.write_bytes(damage)
            assert str(dataset.samples[0].labels) in refused(lambda: dataset.labels(0))

    def test_no_class_file(self, tmp_path: Path) -> None:
        write_image(tmp_path / "images" / "a.png")
        message = refused(lambda: open_dataset("folder", tmp_path, "val"))
        assert message.startswith(f"{tmp_path}/classes.json: can't be read (No such file or directory)")

    def test_no_labels_folder(self, tmp_path: Path) -> None:
        write_classes(tmp_path / "classes.json", self.CLASSES)
        write_image(tmp_path / "images" / "a.png")
        assert f"{tmp_path}/labels: no such folder" in refused(lambda: open_dataset("folder", tmp_path, "val"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON text"),
        ('[{"name": "a"}', "not JSON text"),
        (b"\xff\xfe\x00[", "not JSON text"),
        ("[" * 100_000, "not JSON text"),
        ("{}", "expected a list of"),
        ('{"name": "a"}', "expected a list of"),
        ('["a", "b"]', "expected a list of"),
        ("7", "expected a list of"),
        ("[]", "0 classes; expected 1 to 255"),
        (json.dumps([{"name": str(i)} for i in range(256)]), "256 classes; expected 1 to 255"),
        ('[{"color": [0, 0, 0]}]', "needs a name of its own; got None"),
        ('[{"name": ""}]', "needs a name of its own; got ''"),
        ('[{"name": 3}]', "needs a name of its own; got 3"),
        ('[{"name": "a"}, {"name": "a"}]', "needs a name of its own; got 'a', 'a'"),
        ('[{"name": "a", "value": 256}]', "within 0..255; got [256]"),
        ('[{"name": "a", "value": -1}]', "within 0..255; got [-1]"),
        ('[{"name": "a", "value": 1.0}]', "within 0..255; got [1.0]"),
        ('[{"name": "a", "value": true}]', "within 0..255; got [True]"),
        ('[{"name": "a", "value": 1}, {"name": "b"}]', "must be distinct integers within 0..255; got [1, 1]"),
        ('[{"name": "a", "color": [0, 0]}]', "the color of 'a' is [0, 0]; expected three integers"),
        ('[{"name": "a", "color": [0, 0, 256]}]', "the color of 'a' is [0, 0, 256]"),
        ('[{"name": "a", "color": "red"}]', "the color of 'a' is 'red'"),
        ('[{"name": "a", "color": null}]', "the color of 'a' is None"),
    ],
)
def test_a_damaged_class_file(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "classes.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(lambda: read_class_file(path))
    assert message.startswith(f"{path}: ")
    assert words in message


def test_an_unknown_kind(tmp_path: Path) -> None:
    message = refused(lambda: open_dataset("voc", tmp_path, "val"), ConfigError)
    assert message == "data set kind is 'voc'; expected camvid, cityscapes or folder"


def test_a_root_that_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for root in (tmp_path / "missing", file):
        assert refused(lambda root=root: open_dataset("camvid", root, "val")) == f"{root}: no such folder"


def test_a_root_with_a_name_that_is_too_long(tmp_path: Path) -> None:
    root = tmp_path / ("x" * (os.pathconf(tmp_path, "PC_NAME_MAX") + 1))
    assert "can't be read (File name too long)" in refused(lambda: open_dataset("camvid", root, "val"))
