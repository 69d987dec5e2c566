"""The picture of a comparison: the worst frames, what A and B say about them, and where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.images import Image, Labels
from ddsm_deploy.runtime.segmentation import Segmentation

CELL_WIDTH = 400
"""Pixels of one column; wider frames are reduced, narrower ones enlarged by a whole number."""

_GAP, _LINE, _FONT = 6, 26, cv2.FONT_HERSHEY_SIMPLEX
_PAPER, _INK, _FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
_CHANGED = (255, 0, 255)  # BGR magenta: in no usual palette of streets, and far from every grey
_ALPHA = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One frame of the picture.

    Attributes:
        name: its caption.
        image: uint8 H×W×3, BGR.
        a: A's mask, of any one size that B's mask and the truth share.
        b: B's mask.
        truth: the labels, 255 for void; None without any.
    """

    name: str
    image: Image
    a: Segmentation
    b: Segmentation
    truth: Labels | None = None


def draw_comparison(rows: Sequence[Comparison], *, a: str, b: str) -> Image:
    """One row a frame: the image, A's and B's mask over it, the changed pixels in magenta, and the truth if given.

    A box marks the window with most changes; the last column shows it enlarged, A's mask above B's.

    Args:
        rows: at least one; the columns are those of the first.
        a: what A is, for the heading.
        b: likewise.

    Returns:
        uint8 H×W×3, BGR.

    Raises:
        ConfigError: no row.
    """
    if not rows:
        raise ConfigError("no frame to draw")
    strips = [_strip(row, with_truth=rows[0].truth is not None) for row in rows]
    headings = ["image", f"A: {a}", f"B: {b}", "changed", *["truth"] * (rows[0].truth is not None), "closer: A over B"]
    widths = [CELL_WIDTH] * (len(headings) - 1) + [CELL_WIDTH // 2]
    parts = [_bar(headings, widths, colour=_INK)]
    for row, strip in zip(rows, strips, strict=True):
        share = 100 * float((row.a.mask != row.b.mask).mean())
        parts += [_bar([f"{row.name}: {share:.3g} % changed"], [strip.shape[1]], colour=_FAINT), strip]
    parts.append(_legend(rows[0].a, parts[0].shape[1], rows))
    return _framed(np.concatenate(parts))


def write_picture(path: str | Path, picture: Image) -> None:
    """Writes a PNG; it appears under its name when it is whole.

    Raises:
        ConfigError: the name does not end in ``.png``.
        InputError: it can't be written.
    """
    path = Path(path)
    check_picture_name(path)
    done, data = cv2.imencode(".png", picture)
    assert done  # an array of this kind always encodes
    with replacing(path) as temporary, writing(path):
        temporary.write_bytes(data.tobytes())


def check_picture_name(path: str | Path) -> None:
    """Raises `ConfigError` unless the name ends in ``.png``: best said before the work."""
    if Path(path).suffix.lower() != ".png":
        raise ConfigError(f"{path}: the picture is a PNG; give it a name that ends in .png")


def _strip(row: Comparison, *, with_truth: bool) -> Image:
    """One row of cells, without its caption."""
    size = row.a.mask.shape
    image = _fit(row.image, (size[1], size[0]))
    changed = row.a.mask != row.b.mask
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    seen = (grey * 0.35 + 140).astype(np.uint8)  # pale, so that single pixels of colour stand out
    top, left, height, width = _window(changed)
    cells = [image, row.a.overlay(image, alpha=_ALPHA), row.b.overlay(image, alpha=_ALPHA)]
    cells.append(_highlight(seen, changed))
    if with_truth:
        cells.append(_truth(row, image))
    scaled = [_cell(cell, nearest=index > 0) for index, cell in enumerate(cells)]
    if changed.any():
        down, across = (of / by for of, by in zip(scaled[0].shape, size, strict=False))
        first = (round(left * across) - 2, round(top * down) - 2)
        last = (round((left + width) * across) + 1, round((top + height) * down) + 1)
        for cell in scaled[1:4]:
            cv2.rectangle(cell, first, last, _PAPER, 3)
            cv2.rectangle(cell, first, last, _INK, 1)
    closer = [cell[top : top + height, left : left + width] for cell in cells[1:3]]
    half = scaled[0].shape[0] // 2
    sides = [
        cv2.resize(part, (CELL_WIDTH // 2, rows), interpolation=cv2.INTER_NEAREST)
        for part, rows in zip(closer, (half - 1, scaled[0].shape[0] - half - 1), strict=True)
    ]
    line = np.full((2, CELL_WIDTH // 2, 3), _PAPER, np.uint8)
    scaled.append(np.concatenate([sides[0], line, sides[1]]))
    return _beside(scaled)


def _window(changed: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the window with most changed pixels, a quarter of the frame each way."""
    high, wide = (max(1, round(side / 4)) for side in changed.shape)
    sums = cv2.integral(changed.astype(np.uint8))
    counts = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = (int(at) for at in np.unravel_index(int(counts.argmax()), counts.shape))
    rows, columns = np.nonzero(changed[top : top + high, left : left + wide])
    if len(rows):  # of all windows that hold them, the one in whose middle they lie
        top += round(float(rows.mean()) - high / 2)
        left += round(float(columns.mean()) - wide / 2)
    return min(max(top, 0), changed.shape[0] - high), min(max(left, 0), changed.shape[1] - wide), high, wide


def _highlight(image: Image, changed: np.ndarray) -> Image:
    """Changed pixels in magenta with a soft halo, so that a single one is seen at all."""
    reach = max(2, round(2 * changed.shape[1] / CELL_WIDTH))  # two pixels of the picture, whatever the frame's size
    halo = cv2.dilate(changed.astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)).astype(bool)
    result = image.copy()
    result[halo] = (0.5 * image[halo] + 0.5 * np.array(_CHANGED)).astype(np.uint8)
    result[changed] = _CHANGED
    return result


def _truth(row: Comparison, image: Image) -> Image:
    if row.truth is None:
        return np.full_like(image, 255)
    shown = dataclasses.replace(row.a, mask=row.truth).overlay(image, alpha=_ALPHA)  # void is black
    return np.asarray(shown, np.uint8)


def _fit(image: Image, size: tuple[int, int]) -> Image:
    if image.shape[1::-1] == size:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _cell(cell: Image, *, nearest: bool) -> Image:
    height = min(max(2, round(cell.shape[0] * CELL_WIDTH / cell.shape[1])), 2 * CELL_WIDTH)  # towers are squeezed
    smaller = cell.shape[1] > CELL_WIDTH
    way = cv2.INTER_AREA if smaller else cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    return np.ascontiguousarray(cv2.resize(cell, (CELL_WIDTH, height), interpolation=way), np.uint8)


def _beside(cells: Sequence[Image]) -> Image:
    gap = np.full((cells[0].shape[0], _GAP, 3), _PAPER, np.uint8)
    parts = [part for cell in cells for part in (cell, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _bar(texts: Sequence[str], widths: Sequence[int], *, colour: tuple[int, int, int]) -> Image:
    """A line of texts, each above its column and cut to its width."""
    cells = []
    for text, width in zip(texts, widths, strict=True):
        cell = np.full((_LINE, width, 3), _PAPER, np.uint8)
        cv2.putText(cell, _shortened(text, width - 4), (2, 18), _FONT, 0.45, colour, 1, cv2.LINE_AA)
        cells.append(cell)
    return _beside(cells)


def _shortened(text: str, width: int) -> str:
    """The text, of which the middle is left out where it would be wider than so many pixels."""
    text = text.encode("ascii", "replace").decode()  # OpenCV's font has no more
    whole = text
    while len(text) > 8 and cv2.getTextSize(text, _FONT, 0.45, 1)[0][0] > width:
        keep = (len(text) - 4) // 2
        text = f"{whole[:keep]}...{whole[-keep:]}"
    return text


def _legend(shown: Segmentation, width: int, rows: Sequence[Comparison]) -> Image:
    """Names and colours of the classes that appear, in as many lines as they need."""
    present = np.zeros(256, bool)
    for row in rows:
        for mask in (row.a.mask, row.b.mask, *([] if row.truth is None else [row.truth])):
            present |= np.bincount(mask.ravel(), minlength=256) > 0
    lines, x = [np.full((_LINE, width, 3), _PAPER, np.uint8)], 2
    for identity in np.flatnonzero(present[: len(shown.classes)]):
        text = _shortened(shown.classes[identity], 200)
        needed = 22 + cv2.getTextSize(text, _FONT, 0.45, 1)[0][0] + 18
        if x + needed > width and x > 2:
            lines.append(np.full((_LINE, width, 3), _PAPER, np.uint8))
            x = 2
        red, green, blue = shown.palette[identity]
        cv2.rectangle(lines[-1], (x, 8), (x + 14, 20), (blue, green, red), -1)
        cv2.rectangle(lines[-1], (x, 8), (x + 14, 20), _INK, 1)
        cv2.putText(lines[-1], text, (x + 20, 18), _FONT, 0.45, _INK, 1, cv2.LINE_AA)
        x += needed
    return np.concatenate(lines)


def _framed(picture: Image) -> Image:
    framed = cv2.copyMakeBorder(picture, 4, 4, 8, 8, cv2.BORDER_CONSTANT, value=_PAPER)
    return np.asarray(framed, np.uint8)
