"""Labelled data sets as lists of files: CamVid, Cityscapes, and any folder of images and labels.

Only paths and numbers here (no torch): training, export's parity check, calibration and evaluation all read through
this page.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import SUFFIXES, Labels, read_labels
from ddsm_deploy.spec import MAX_CLASSES, default_palette

IGNORE = 255
"""Label value that no class has: left out of every loss and metric."""

Colour = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Classes:
    """Names and RGB colours of the classes, and the table from raw label values (0..255) to ids (or `IGNORE`)."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    from_raw: npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image and its label map, as files."""

    image: Path
    labels: Path


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One split of a labelled data set, in a fixed order (sorted by path)."""

    name: str
    split: str
    classes: Classes
    samples: tuple[Sample, ...]

    def labels(self, index: int) -> Labels:
        """The label map of sample `index`: uint8, H×W, class ids; values that no class has become `IGNORE`.

        Raises:
            InputError: unreadable.
        """
        path = self.samples[index].labels
        return self.classes.from_raw[read_labels(path)]


def _table(known: dict[int, int]) -> npt.NDArray[np.uint8]:
    table = np.full(256, IGNORE, dtype=np.uint8)
    for raw, identity in known.items():
        table[raw] = identity
    return table


# Names and colours of the SegNet edition of CamVid; label 11 is "unlabelled" and ignored.
_CAMVID = (
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)

# The 19 training classes of Cityscapes as (labelId, name, colour), from the data set's own label table.
_CITYSCAPES = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)


def camvid_classes() -> Classes:
    """The 11 classes of the SegNet edition of CamVid (Brostow, Fauqueur, Cipolla 2009; Badrinarayanan et al. 2017)."""
    names, palette = zip(*_CAMVID, strict=True)
    return Classes(names, palette, _table({i: i for i in range(len(names))}))


def cityscapes_classes() -> Classes:
    """The 19 training classes of Cityscapes (Cordts et al. 2016), read from ``*_labelIds.png``."""
    raw, names, palette = zip(*_CITYSCAPES, strict=True)
    return Classes(names, palette, _table({r: i for i, r in enumerate(raw)}))


def open_dataset(kind: str, root: str | Path, split: str) -> Dataset:
    """Lists one split of a data set on disk.

    Args:
        kind: ``camvid`` (``SPLIT/*.png`` with ``SPLITannot/*.png``), ``cityscapes`` (``leftImg8bit/SPLIT/CITY`` with
            ``gtFine/SPLIT/CITY/*_labelIds.png``), or ``folder`` (``SPLIT/images`` with ``SPLIT/labels``, or ``images``
            with ``labels`` where there are no splits, and ``classes.json`` in the root).
        root: the data set's folder.
        split: usually ``train`` or ``val``; several joined by ``+`` (``train+val``) give all of their images.

    Raises:
        ConfigError: an unknown kind, or a split named twice.
        InputError: the layout is not there, an image lacks its label, or there is no image at all.
    """
    if "+" in split:
        names = split.split("+")
        if len(set(names)) < len(names):
            raise ConfigError(f"split {split!r} names one split twice")
        parts = [open_dataset(kind, root, name) for name in names]
        return dataclasses.replace(parts[0], split=split, samples=tuple(s for part in parts for s in part.samples))
    root = Path(root)
    try:
        there = root.is_dir()
    except OSError as exc:  # a name that is too long, or a parent that can't be searched
        raise InputError(f"{root}: can't be read ({exc.strerror})") from exc
    if not there:
        raise InputError(f"{root}: no such folder")
    match kind:
        case "camvid":
            classes = camvid_classes()
            samples = _paired(root / split, root / f"{split}annot")
        case "cityscapes":
            classes = cityscapes_classes()
            samples = _cityscapes(root, split)
        case "folder":
            classes = read_class_file(root / "classes.json")
            samples = _folder(root, split)
        case _:
            raise ConfigError(f"data set kind is {kind!r}; expected camvid, cityscapes or folder")
    if not samples:
        raise InputError(f"{root}: no image in split {split!r} of a {kind} data set")
    return Dataset(kind, split, classes, tuple(samples))


def read_class_file(path: str | Path) -> Classes:
    """Reads ``classes.json``: a list of ``{"name": ..., "color": [r, g, b], "value": raw label}``.

    ``color`` may be left out (the VOC colour map serves), and ``value`` too (the entry's place in the list). Label
    values that no entry names are void.

    Raises:
        InputError: missing, or not of that form.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise InputError(
            f"{path}: can't be read ({exc.strerror or exc}); a folder data set needs a class file"
        ) from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: not JSON text ({exc})") from exc
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{path}: expected a list of {{"name", "color", "value"}}')
    if not 1 <= len(entries) <= MAX_CLASSES:
        raise InputError(f"{path}: {len(entries)} classes; expected 1 to {MAX_CLASSES}")
    spare = default_palette(len(entries))
    names = tuple(entry.get("name") for entry in entries)
    colours = tuple(entry.get("color", list(spare[index])) for index, entry in enumerate(entries))
    values = [entry.get("value", index) for index, entry in enumerate(entries)]
    if not all(isinstance(name, str) and name for name in names) or len(set(names)) != len(names):
        raise InputError(f"{path}: every class needs a name of its own; got {', '.join(map(repr, names))}")
    if not all(map(_is_byte, values)) or len(set(values)) != len(values):
        raise InputError(f"{path}: label values must be distinct integers within 0..255; got {values}")
    for name, colour in zip(names, colours, strict=True):
        if not isinstance(colour, list) or len(colour) != 3 or not all(map(_is_byte, colour)):
            raise InputError(f"{path}: the color of {name!r} is {colour!r}; expected three integers within 0..255")
    palette = tuple((r, g, b) for r, g, b in colours)
    return Classes(names, palette, _table({value: index for index, value in enumerate(values)}))


def _is_byte(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255


def _folder(root: Path, split: str) -> list[Sample]:
    base = root / split if (root / split).is_dir() else root
    if not (base / "images").is_dir():
        raise InputError(f"{root}: neither {split}/images nor images is a folder there")
    return _paired(base / "images", base / "labels")


def _paired(images: Path, labels: Path) -> list[Sample]:
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    samples = []
    for image in sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        label = (labels / image.relative_to(images)).with_suffix(".png")
        if not label.is_file():
            raise InputError(f"{image}: no label map at {label}")
        samples.append(Sample(image, label))
    return samples


def _cityscapes(root: Path, split: str) -> list[Sample]:
    images = root / "leftImg8bit" / split
    if not images.is_dir():
        raise InputError(f"{images}: no such folder")
    samples = []
    for image in sorted(images.glob("*/*_leftImg8bit.png")):
        stem = image.name.removesuffix("_leftImg8bit.png")
        label = root / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
        if not label.is_file():
            raise InputError(f"{image}: no label map at {label}")
        samples.append(Sample(image, label))
    return samples
