"""Segmentation: the result for one image, and the ways to show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.images import Image, Labels

Points = npt.NDArray[np.float32]
"""float32, M×2: x (column) and y (row) in pixels of the image; the centre of its first pixel is (0, 0)."""


@dataclasses.dataclass(frozen=True)
class Polygon:
    """One connected region of one class.

    The outlines run through the centres of the region's own outermost pixels, one point a pixel; a hole's outline runs
    through the pixels *around* the hole. Source: OpenCV's `findContours`.

    Attributes:
        class_id: id of its class.
        name: its class.
        exterior: outer outline, not closed (the first point is not repeated).
        holes: inner outlines, likewise.
        area: pixels of the region, its outline included and its holes left out.
    """

    class_id: int
    name: str
    exterior: Points
    holes: tuple[Points, ...]
    area: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """What a model says about one image.

    Attributes:
        mask: uint8 H×W, class ids, at the image's own size.
        classes: names, in the order of their ids.
        palette: one RGB triple (0..255) a class.
        confidence: uint8 H×W, softmax probability of the chosen class, 255 = 1; None where the model doesn't give it.
        timings: milliseconds spent in ``prepare``, ``infer`` and ``finish``; empty where nobody measured.
    """

    mask: Labels
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    confidence: Labels | None = None
    timings: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def color(self) -> Image:
        """The mask in the palette's colours: uint8 H×W×3, BGR; ids beyond the classes are black."""
        table = np.zeros((256, 1, 3), np.uint8)
        table[: len(self.palette), 0] = np.array(self.palette, np.uint8)[:, ::-1]
        return cv2.applyColorMap(self.mask, table).astype(np.uint8, copy=False)

    def overlay(self, image: Image, *, alpha: float = 0.5) -> Image:
        """The colours laid over the image.

        Args:
            image: uint8 H×W×3, BGR, of the mask's size.
            alpha: weight of the colours, 0 to 1.

        Raises:
            InputError: the image is of another size or type.
            ConfigError: alpha is out of range.
        """
        if image.dtype != np.uint8 or image.shape != (*self.mask.shape, 3):
            expected = f"uint8 {self.mask.shape[0]}x{self.mask.shape[1]}x3"
            raise InputError(f"overlay got {image.dtype} {'x'.join(map(str, image.shape))}; expected {expected}")
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha is {alpha}; expected 0 to 1")
        return cv2.addWeighted(image, 1.0 - alpha, self.color(), alpha, 0.0).astype(np.uint8, copy=False)

    def polygons(self, *, min_area: float = 16.0) -> list[Polygon]:
        """The mask's regions (connected over sides and corners) as polygons, in the order of class ids.

        Args:
            min_area: regions of fewer pixels are left out, and so are holes of fewer. A region of one or two pixels has
                no polygon and is always left out.
        """
        found = []
        for class_id in np.flatnonzero(np.bincount(self.mask.ravel(), minlength=256)[: len(self.classes)]):
            region = (self.mask == class_id).view(np.uint8)
            contours, links = cv2.findContours(region, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            if links is None:
                continue
            for outline, (_, _, child, parent) in zip(contours, links[0], strict=True):
                if parent >= 0:
                    continue  # a hole: met below, from its exterior
                holes, area = [], _pixels(outline)
                while child >= 0:
                    size = _pixels(contours[child], hole=True)
                    area -= size
                    if size >= min_area:
                        holes.append(_points(contours[child]))
                    child = links[0][child][0]
                if area >= min_area and len(outline) > 2:
                    name = self.classes[class_id]
                    found.append(Polygon(int(class_id), name, _points(outline), tuple(holes), area))
        return found


def _points(outline: npt.NDArray[np.int32]) -> Points:
    return outline.reshape(-1, 2).astype(np.float32)


def _pixels(outline: npt.NDArray[np.int32], *, hole: bool = False) -> float:
    """How many pixels an outline encloses, by Pick's theorem: its own included, those of a hole's outline not."""
    steps = len(outline) if len(outline) > 1 else 0
    area = cv2.contourArea(outline)
    return area - steps / 2 + 1 if hole else area + steps / 2 + 1
