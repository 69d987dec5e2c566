"""What a request may ask for, and its bytes."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any, Literal

import numpy as np

from ddsm_deploy.images import Image, Labels
from ddsm_deploy.runtime.coco import run_lengths
from ddsm_deploy.runtime.outputs import color_png, geojson, mask_png, overlay_jpeg
from ddsm_deploy.runtime.segmentation import Segmentation

Format = Literal["mask", "color", "overlay", "json"]
MaskEncoding = Literal["png", "rle", "none"]

MEDIA_TYPES: dict[Format, str] = {
    "mask": "image/png",
    "color": "image/png",
    "overlay": "image/jpeg",
    "json": "application/json",
}

_OFFERED: tuple[Format, ...] = ("mask", "overlay", "json")
"""What an Accept header can choose, best first where it leaves that open."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be made of an image.

    Attributes:
        format: the mask as PNG, in colours as PNG, over the image as JPEG, or all about it as JSON.
        mask: how JSON holds the mask.
        polygons: whether JSON holds outlines.
    """

    format: Format = "mask"
    mask: MaskEncoding = "png"
    polygons: bool = False

    @property
    def media_type(self) -> str:
        """Of the answer."""
        return MEDIA_TYPES[self.format]


def negotiate(accept: str) -> Format | None:
    """What an Accept header asks for (RFC 9110, section 12.5.1), or None where it takes nothing of ours."""
    qualities = _qualities(accept)
    if not qualities:
        return _OFFERED[0]
    best = max(_OFFERED, key=lambda name: _quality(MEDIA_TYPES[name], qualities))  # the first of equal ones
    return best if _quality(MEDIA_TYPES[best], qualities) > 0 else None


def _qualities(accept: str) -> dict[str, float]:
    """Media range -> quality; what is no such thing is left out."""
    found: dict[str, float] = {}
    for entry in accept.split(","):
        media_range, *parameters = (part.strip().lower() for part in entry.split(";"))
        text = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            quality = float(text)
        except ValueError:
            continue
        if "/" in media_range and 0 <= quality <= 1:
            found[media_range] = max(quality, found.get(media_range, 0.0))
    return found


def _quality(media_type: str, qualities: dict[str, float]) -> float:
    ranges = (media_type, f"{media_type.split('/')[0]}/*", "*/*")
    return next((qualities[entry] for entry in ranges if entry in qualities), 0.0)


def encode(segmentation: Segmentation, image: Image, wanted: Wanted) -> bytes:
    """The answer's body.

    Args:
        segmentation: of `image`.
        image: uint8, H×W×3, BGR.
        wanted: what to make.

    Raises:
        InputError: the image has a side that JPEG can't hold.
    """
    match wanted.format:
        case "mask":
            return mask_png(segmentation)
        case "color":
            return color_png(segmentation)
        case "overlay":
            return overlay_jpeg(segmentation, image)
        case "json":
            return json.dumps(_as_json(segmentation, wanted), separators=(",", ":")).encode()


def _as_json(segmentation: Segmentation, wanted: Wanted) -> dict[str, Any]:
    mask = segmentation.mask
    counts = _class_counts(mask)
    classes = [
        {
            "id": index,
            "name": name,
            "color": list(segmentation.palette[index]),
            "pixels": int(counts[index]),
            "share": float(counts[index] / mask.size),
        }
        for index, name in enumerate(segmentation.classes)
    ]
    return {
        "width": mask.shape[1],
        "height": mask.shape[0],
        "classes": classes,
        "mask": _mask_json(segmentation, wanted.mask, [int(index) for index in np.flatnonzero(counts)]),
        "polygons": geojson(segmentation) if wanted.polygons else None,
    }


def _class_counts(mask: Labels) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Pixels of each id, row by row: numpy widens what it counts to eight bytes a pixel."""
    counts = np.zeros(256, np.int64)
    for row in mask:
        counts += np.bincount(row, minlength=256)
    return counts


def _mask_json(segmentation: Segmentation, encoding: MaskEncoding, present: list[int]) -> dict[str, Any] | None:
    mask = segmentation.mask
    match encoding:
        case "png":
            return {"encoding": "png", "data": base64.b64encode(mask_png(segmentation)).decode("ascii")}
        case "rle":
            regions = [{"class_id": index, "counts": run_lengths((mask == index).view(np.uint8))} for index in present]
            return {"encoding": "rle", "size": list(mask.shape), "regions": regions}
        case "none":
            return None
