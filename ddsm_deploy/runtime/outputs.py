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
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Image
from ddsm_deploy.listing import PRODUCT_FOLDERS
from ddsm_deploy.runtime.coco import coco_part
from ddsm_deploy.runtime.segmentation import Segmentation

POLYGON_FORMATS = ("geojson", "coco")

OVERLAY_QUALITY = 90
"""JPEG quality of overlays."""

# Masks are flat areas: run lengths at level 1 are several times quicker than zlib's default, and hardly larger.
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
            encoded["color"] = color_png(segmentation)
        if self.overlay:
            encoded["overlay"] = overlay_jpeg(segmentation, image)
        if self.confidence:
            if segmentation.confidence is None:
                raise ConfigError("the model gives no confidence")
            encoded["confidence"] = _image_bytes(".png", segmentation.confidence, _SMOOTH_PNG)
        if self.polygons == "geojson":
            encoded["polygons"] = json.dumps(geojson(segmentation)).encode()
        elif self.polygons == "coco":
            encoded["polygons"] = json.dumps(coco_part(segmentation.mask, file_name)).encode()
        encoded["masks"] = mask_png(segmentation)
        return encoded


def mask_png(segmentation: Segmentation) -> bytes:
    """The mask as PNG: 8-bit grey, the pixel is the class id."""
    return _image_bytes(".png", segmentation.mask, _FLAT_PNG)


def color_png(segmentation: Segmentation) -> bytes:
    """The mask as PNG in the model's palette."""
    return _image_bytes(".png", segmentation.color(), _FLAT_PNG)


def overlay_jpeg(segmentation: Segmentation, image: Image) -> bytes:
    """The image (uint8, H×W×3, BGR) with the coloured mask over it, as JPEG.

    Raises:
        InputError: above 65500 pixels a side, which JPEG does not hold.
    """
    return _image_bytes(".jpg", segmentation.overlay(image), (cv2.IMWRITE_JPEG_QUALITY, OVERLAY_QUALITY))


def geojson(segmentation: Segmentation) -> dict[str, Any]:
    """A FeatureCollection in pixel coordinates (x to the right, y down), which RFC 7946 has no reference system for."""
    features = []
    for polygon in segmentation.polygons():
        rings = [_ring(points) for points in (polygon.exterior, *polygon.holes)]
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": rings},
                "properties": {"class_id": polygon.class_id, "name": polygon.name, "area": polygon.area},
            }
        )
    height, width = segmentation.mask.shape
    return {"type": "FeatureCollection", "width": width, "height": height, "features": features}


def write_files(root: Path, files: Mapping[str, bytes]) -> None:
    """Writes files (relative path -> bytes) below `root`; each appears whole or not at all, and none if one can't be.

    Raises:
        OSError: the disk is full, a folder can't be made, and so on; nothing half-written is left.
    """
    temporaries: list[tuple[Path, Path]] = []
    try:
        for relative, data in files.items():
            target = root / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            temporaries.append((temporary_beside(target), target))
            with temporaries[-1][0].open("xb") as file:
                file.write(data)
        for temporary, target in temporaries:
            temporary.replace(target)
    except BaseException:
        for temporary, _ in temporaries:
            with contextlib.suppress(OSError):  # renamed already, or never made
                temporary.unlink()
        raise


def temporary_beside(target: Path) -> Path:
    """A fresh name in the folder of `target`, short whatever the target's length, that `remove_temporaries` knows."""
    return target.with_name(temporary_name())


def temporary_name() -> str:
    """A name for a file that is not whole yet, which no other process takes, on whatever machine."""
    return f"{_TEMPORARY[0]}{uuid.uuid4().hex}{_TEMPORARY[1]}"


def remove_temporaries(root: Path) -> None:
    """Deletes what a killed run left half-written in an output folder; only files of this module's naming.

    Raises:
        OSError: one can't be deleted.
    """
    for folder in (root, *(root / name for name in PRODUCT_FOLDERS)):
        pattern = f"{_TEMPORARY[0]}*{_TEMPORARY[1]}"
        for path in folder.glob(pattern) if folder is root else folder.rglob(pattern):
            path.unlink()


def _image_bytes(suffix: str, image: npt.NDArray[np.uint8], settings: tuple[int, ...]) -> bytes:
    try:
        done, encoded = cv2.imencode(suffix, image, settings)
    except cv2.error as exc:
        raise InputError(f"can't be encoded as {suffix}: {' '.join(exc.err.split())}") from exc
    if not done:
        height, width = image.shape[:2]
        raise InputError(f"{width}x{height} can't be encoded as {suffix}")
    return encoded.tobytes()


def _ring(points: npt.NDArray[np.float32]) -> list[list[float]]:
    steps = np.diff(points, axis=0, prepend=points[-1:], append=points[:1])
    corners = points[(steps[:-1] != steps[1:]).any(axis=1)]  # points on a straight line say nothing
    # closed, as RFC 7946 has it: the first position comes again; and it asks for four, which a line of pixels has not
    closing = np.repeat(corners[:1], max(1, 4 - len(corners)), axis=0)
    ring: list[list[float]] = np.concatenate([corners, closing]).astype(float).tolist()
    return ring
