"""COCO annotations of a batch run: one part an image, joined into ``annotations.json`` when the run ends.

The parts are files of their own, because a run may be killed and resumed: what is finished stays finished. A region is
a set of pixels of one class joined at edges or corners; all regions together are the mask, pixel for pixel. A region
without holes is a polygon along its pixels' edges (pixel (0, 0) covers 0..1 × 0..1); one with holes is an uncompressed
run-length encoding, as pycocotools reads it.

Source: the COCO data format, https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.uint8]


def coco_part(mask: Mask, file_name: str) -> dict[str, Any]:
    """The ``image`` and the ``annotations`` of one mask (uint8, H×W, class ids), still without their ids.

    Category ids are class ids plus one, as COCO counts from 1.
    """
    height, width = mask.shape
    annotations = [
        annotation for class_id in np.unique(mask) for annotation in _regions(mask == class_id, int(class_id))
    ]
    return {"image": {"file_name": file_name, "height": height, "width": width}, "annotations": annotations}


def write_coco(file: TextIO, parts: Iterable[Path], classes: Sequence[str]) -> None:
    """Joins parts, in their order, into one COCO document, holding one part at a time in memory.

    Ids of images and annotations count from 1 in that order. Two passes over the parts, as COCO wants two lists.

    Raises:
        OSError, ValueError: a part can't be read.
    """
    parts = list(parts)
    categories = [{"id": i + 1, "name": name, "supercategory": ""} for i, name in enumerate(classes)]
    file.write(f'{{"info": {{}}, "licenses": [],\n"categories": {json.dumps(categories)},\n"images": [')
    _write_items(file, ({"id": i, **part["image"]} for i, part in _read(parts)))
    file.write('],\n"annotations": [')
    _write_items(file, _numbered_annotations(parts))
    file.write("]}\n")


def _read(parts: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, path in enumerate(parts, start=1):
        yield index, json.loads(path.read_text(encoding="utf-8"))


def _numbered_annotations(parts: Sequence[Path]) -> Iterator[dict[str, Any]]:
    number = 0
    for image_id, part in _read(parts):
        for annotation in part["annotations"]:
            number += 1
            yield {"id": number, "image_id": image_id, **annotation}


def _write_items(file: TextIO, items: Iterable[dict[str, Any]]) -> None:
    for index, item in enumerate(items):
        file.write(("" if index == 0 else ",") + "\n" + json.dumps(item))


def _regions(chosen: npt.NDArray[np.bool_], class_id: int) -> Iterator[dict[str, Any]]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(chosen.astype(np.uint8), connectivity=8)
    for index in range(1, count):
        x, y, width, height, area = (int(value) for value in stats[index])
        region = labels[y : y + height, x : x + width] == index
        polygon = _outline(region)
        if polygon is None:
            columns = np.zeros((chosen.shape[0], width), dtype=np.uint8)
            columns[y : y + height] = region
            counts = run_lengths(columns, before=x, after=chosen.shape[1] - x - width)
            segmentation: object = {"size": list(chosen.shape), "counts": counts}
        else:
            segmentation = [np.add(polygon, (x, y)).ravel().tolist()]
        yield {
            "category_id": class_id + 1,
            "segmentation": segmentation,
            "area": area,
            "bbox": [x, y, width, height],
            "iscrowd": 0,
        }


def _outline(region: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64] | None:
    """The corners (M×2, x and y) of a region's outline along pixel edges, or None where it has holes.

    OpenCV's contours run through pixel centres and lose half a pixel on each side. So they are taken on a grid of half
    pixels, in which a pixel is the 3×3 nodes of its centre, edges and corners. Inner corners come out cut by half a
    pixel, which reaches no pixel's centre.
    """
    height, width = region.shape
    nodes = np.zeros((2 * height + 1, 2 * width + 1), dtype=np.uint8)
    nodes[1::2, 1::2] = region
    nodes = cv2.dilate(nodes, np.ones((3, 3), np.uint8)).astype(np.uint8)
    contours, _ = cv2.findContours(nodes, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if len(contours) != 1:
        return None
    return contours[0].reshape(-1, 2).astype(np.float64) / 2.0


def run_lengths(mask: Mask, *, before: int = 0, after: int = 0) -> list[int]:
    """Lengths of the runs of zeros and ones in turn, zeros first, down the columns of a mask of zeros and ones.

    `before` and `after` are empty columns to the left and right of it.
    """
    flat = np.concatenate(([0], mask.ravel(order="F"), [0]))  # so that it begins and ends with a run of zeros
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate(([0], edges, [mask.size])))
    lengths[0] += before * mask.shape[0]
    lengths[-1] += after * mask.shape[0]
    counts: list[int] = lengths.tolist()
    return counts if counts[-1] else counts[:-1]
