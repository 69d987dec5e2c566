"""What a batch run writes for one image, and how: encoded in memory, under a temporary name, then renamed.

    masks/NAME.png               class ids, 8-bit grey
    color/NAME.png               the mask in the model's palette
    overlay/NAME.jpg             the image with the coloured mask over it
    confidence/NAME.png          probability of the chosen class, 255 is 1.0
    polygons/NAME.geojson        outlines in pixel coordinates, one feature a region
    polygons/NAME.coco.json      one image's part of `annotations.json` (`ddsm_deploy.runtime.coco`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.runtime.coco import coco_part
from ddsm_deploy.runtime.segmentation import Segmentation
from ddsm_deploy.runtime.sources import PRODUCT_FOLDERS

POLYGON_FORMATS = ("geojson", "coco")

OVERLAY_QUALITY = 90
"""JPEG quality of overlays."""

# Masks are flat areas. On CamVid's labels level 1 with run lengths takes 0.5 ms and 4.7 kB a frame, zlib's level 6 takes
# 1.8 ms and 4.5 kB, level 9 takes 11 ms and 3.7 kB.
_FLAT_PNG = (
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_UP,
)
_SMOOTH_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)

_TEMPORARY = (".ddsm-", ".part")
_numbers = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Products:
    """Which files are made of an image, beside its mask.

    Attributes:
        color: the mask in colours.
        overlay: the image with the coloured mask over it.
        confidence: the probability of the chosen class; the model must have that output.
        polygons: ``geojson``, ``coco``, or None for none.
    """

    color: bool = False
    overlay: bool = False
    confidence: bool = False
    polygons: str | None = None

    def __post_init__(self) -> None:
        if self.polygons is not None and self.polygons not in POLYGON_FORMATS:
            raise ConfigError(f"polygons is {self.polygons!r}; expected {' or '.join(POLYGON_FORMATS)}")

    def files(self, name: str) -> dict[str, str]:
        """Product -> file of an image, relative to the output folder. The mask is last: where it is, all are."""
        suffixes = {
            "color": ".png" if self.color else None,
            "overlay": ".jpg" if self.overlay else None,
            "confidence": ".png" if self.confidence else None,
            "polygons": {"geojson": ".geojson", "coco": ".coco.json", None: None}[self.polygons],
            "masks": ".png",
        }
        return {folder: f"{folder}/{name}{suffix}" for folder, suffix in suffixes.items() if suffix is not None}

    def encode(self, segmentation: Segmentation, image: Image, *, file_name: str) -> dict[str, bytes]:
        """Product -> bytes of its file.

        Args:
            segmentation: of `image`.
            image: uint8, H×W×3, BGR.
            file_name: of the image, as COCO records it.

        Raises:
            InputError: an encoder refused, as JPEG does above 65500 pixels a side.
        """
        encoded: dict[str, bytes] = {}
        if self.color:
            encoded["color"] = _image_bytes(".png", segmentation.color(), _FLAT_PNG)
        if self.overlay:
            quality = (cv2.IMWRITE_JPEG_QUALITY, OVERLAY_QUALITY)
            encoded["overlay"] = _image_bytes(".jpg", segmentation.overlay(image), quality)
        if self.confidence:
            if segmentation.confidence is None:
                raise ConfigError(
                    "this model has no confidence output; export one with: ddsm export CHECKPOINT --confidence"
                )
            encoded["confidence"] = _image_bytes(".png", segmentation.confidence, _SMOOTH_PNG)
        if self.polygons == "geojson":
            encoded["polygons"] = json.dumps(_geojson(segmentation)).encode()
        elif self.polygons == "coco":
            encoded["polygons"] = json.dumps(coco_part(segmentation, file_name)).encode()
        encoded["masks"] = _image_bytes(".png", segmentation.mask, _FLAT_PNG)
        return encoded


def write_files(root: str, files: Mapping[str, bytes]) -> None:
    """Writes files (relative path -> bytes) below `root`; each appears whole or not at all, and none if one can't be.

    Raises:
        OSError: the disk is full, a folder can't be made, and so on; nothing half-written is left.
    """
    temporaries: list[tuple[str, Path]] = []
    try:
        for relative, data in files.items():
            target = Path(root, relative)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f"{_TEMPORARY[0]}{os.getpid()}-{next(_numbers)}{_TEMPORARY[1]}")
            with temporary.open("xb") as file:
                temporaries.append((str(temporary), target))
                file.write(data)
        for temporary_name, target in temporaries:
            Path(temporary_name).replace(target)
    except BaseException:
        for temporary_name, _ in temporaries:
            with contextlib.suppress(OSError):  # renamed already, or gone with its folder
                Path(temporary_name).unlink()
        raise
