"""Reading images and label maps, safely: every failure is an `InputError` that names the file.

Pillow reads the header (so that a decompression bomb is refused before a byte of it is decoded) and label maps (so that
indices of a palette PNG stay indices); OpenCV decodes images, being several times faster at it. What OpenCV forgives,
this page does not: a truncated file would come out partly grey, and its mask would look like a result.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
import PIL.Image

from ddsm_deploy.errors import ImageTooLarge, InputError

Image = npt.NDArray[np.uint8]
"""uint8, H×W×3, BGR as OpenCV gives it."""

Labels = npt.NDArray[np.uint8]
"""uint8, H×W, class ids."""

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""What counts as an image in a folder, compared in lower case."""

MAX_PIXELS = 100_000_000
"""Images above this are refused: 100 megapixels are 300 MB decoded, beyond any camera on a robot."""

_BYTES_PER_PIXEL = 8  # 16-bit RGBA, uncompressed: the most that an honest file takes
_METADATA_BYTES = 1 << 24
# a number of the header with a comment right behind it; possessive, so that no header takes more than linear time
_PNM_GLUED = re.compile(rb"P\d(?:\s++|#[^\n]*+\n)*+(?:\d++(?:\s++|(?<=\s)#[^\n]*+\n)++){0,2}+\d++#")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_JPEG_END = b"\xff\xd9"

_pillow = threading.Lock()


@contextlib.contextmanager
def _calm_pillow(max_pixels: int) -> Iterator[None]:
    """Pillow without its warning of many pixels, and without its limit where `max_pixels` is above: the limit is ours.

    Both are state of the whole process, so one thread at a time.
    """
    with _pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit = PIL.Image.MAX_IMAGE_PIXELS
        if limit is not None and max_pixels > 2 * limit:  # from there on it refuses
            PIL.Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def image_size(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width in pixels from the header alone, before EXIF rotation (of a TIFF after it, as Pillow has it).

    Raises:
        InputError: not a readable image; `ImageTooLarge` where it is larger than `max_pixels`.
    """
    path = Path(path)
    try:
        _check_regular(path)
        with path.open("rb") as file:
            return _header(file, path, max_pixels)[1:]
    except OSError as exc:
        raise InputError(f"{path}: can't be read ({exc.strerror or exc})") from exc


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image:
    """Decodes an image file of any usual kind to uint8 H×W×3, BGR.

    Grey is repeated over the three channels, alpha is dropped, 16-bit is scaled to 8, CMYK is converted, and an EXIF
    orientation is applied, so the result is what a viewer shows. Of several pages or frames the first is taken.

    Raises:
        InputError: missing, empty, truncated or not an image; `ImageTooLarge` where it is larger than `max_pixels`.
    """
    path = Path(path)
    try:
        size = _check_regular(path)
        with path.open("rb") as file:
            kind, height, width = _header(file, path, max_pixels)
            check_bytes(size, path, max_pixels)
            file.seek(0)
            data = file.read()
    except OSError as exc:
        raise InputError(f"{path}: can't be read ({exc.strerror or exc})") from exc
    except MemoryError as exc:
        raise InputError(f"{path}: out of memory while reading it") from exc
    return _decoded(data, (kind, height, width), path)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, name: str = "the image", upright: bool = True) -> Image:
    """As `read_image`, from the bytes of such a file; messages call it `name`. Without `upright` an EXIF orientation is
    left alone.

    Raises:
        ImageTooLarge: larger than `max_pixels`, by its header.
        InputError: empty, truncated, or not an image.
    """
    if not data:
        raise InputError(f"{name}: empty")
    return _decoded(data, _header(io.BytesIO(data), name, max_pixels), name, upright)


def check_bytes(size: int, name: str | Path, max_pixels: int = MAX_PIXELS) -> None:
    """Refuses a file by its size in bytes, before it is read.

    Raises:
        InputError: it is empty, or larger than the largest image within the limit.
    """
    if size == 0:
        raise InputError(f"{name}: the file is empty")
    if size > max_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES:
        raise InputError(f"{name}: {size >> 20} MiB hold no image within the limit of {max_pixels} pixels")


def read_labels(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Labels:
    """Reads a label map: an 8-bit PNG, grey or palette, whose pixel is the class id. Returns uint8, H×W.

    Raises:
        InputError: unreadable, or not one channel of 8 bits.
    """
    path = Path(path)
    image_size(path, max_pixels=max_pixels)
    try:
        with _calm_pillow(max_pixels):
            image = PIL.Image.open(path)
        with image:
            if image.mode not in ("L", "P"):
                raise InputError(f"{path}: a label map is an 8-bit grey or palette image, this one is {image.mode}")
            if any(tile[3] in ("L;2", "L;4") for tile in image.tile):  # Pillow would stretch these ids to 0..255
                raise InputError(f"{path}: a grey label map of less than 8 bits a pixel; save it with 8, or as palette")
            return np.array(image, dtype=np.uint8)
    except InputError:
        raise
    except Exception as exc:  # Pillow's format plugins raise many kinds on damaged data
        raise InputError(f"{path}: can't be decoded ({_one_line(exc)})") from exc


def _decoded(data: bytes, header: tuple[str, int, int], name: Path | str, upright: bool = True) -> Image:
    kind, height, width = header
    flags = cv2.IMREAD_COLOR if upright else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    if kind == "TIFF":
        if (pixels := _checked_tiff(data, name, height * width)) is not None:
            return pixels
    else:
        _check_whole(kind, data, name)
    if kind == "PPM" and _PNM_GLUED.match(data):
        # Pillow, which has read the size above, ends the number there, OpenCV does not: it would decode a larger image
        raise InputError(f"{name}: a comment right behind a number in its header; set it on a line of its own")
    white = _pnm_white(data) if kind == "PPM" else None
    try:
        image = cv2.imdecode(
            np.frombuffer(data, dtype=np.uint8), flags if white is None else flags | cv2.IMREAD_ANYDEPTH
        )
    except (cv2.error, MemoryError) as exc:
        raise InputError(f"{name}: can't be decoded ({_one_line(exc)})") from exc
    if image is None:
        raise InputError(f"{name}: can't be decoded; the {kind} file ({width}x{height}) is damaged or of a rare kind")
    if image.shape[0] * image.shape[1] != height * width:  # turned upright, a product is the same
        raise InputError(
            f"{name}: its header says {width}x{height}, but {image.shape[1]}x{image.shape[0]} were decoded"
        )
    if white is not None:
        image = np.minimum((image.astype(np.uint32) * 255 + white // 2) // white, 255)
    return image.astype(np.uint8, copy=False)


def _pnm_white(data: bytes) -> int | None:
    """The value of white of a PGM or PPM, where OpenCV does not scale by it.

    It takes samples to be of 8 or of 16 bits: the 10 or 12 of an industrial camera would come out nearly black.
    """
    header = re.match(rb"P([2356])" + 3 * rb"(?:\s+(?:#[^\n]*\n\s*)*)(\d+)", data)
    if header is None:
        return None
    white = int(header[4])
    scaled = white in (255, 65535) or (header[1] in b"23" and white < 255)
    return None if scaled or white == 0 else white


def _check_regular(path: Path) -> int:
    """The file's size in bytes; a pipe or a device would block or never end, so only plain files are read."""
    try:
        status = path.stat()
    except FileNotFoundError as exc:
        what = "a link to nothing" if path.is_symlink() else "no such file"
        raise InputError(f"{path}: {what}") from exc
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: a folder, not an image")
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a plain file")
    if status.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return status.st_size


def _header(file: BinaryIO, name: Path | str, max_pixels: int) -> tuple[str, int, int]:
    """Format (Pillow's word for it), height and width, read from a file's first bytes."""
    try:
        with _calm_pillow(max_pixels), PIL.Image.open(file) as image:
            kind, (width, height) = image.format or "image", image.size
    except PIL.UnidentifiedImageError as exc:
        raise InputError(f"{name}: not an image, or damaged from its first bytes on") from exc
    except PIL.Image.DecompressionBombError as exc:
        raise ImageTooLarge(f"{name}: larger than the limit of {max_pixels} pixels") from exc
    except Exception as exc:  # Pillow's format plugins raise many kinds on damaged headers
        raise InputError(f"{name}: not a readable image ({_one_line(exc)})") from exc
    if height * width > max_pixels:
        raise ImageTooLarge(f"{name}: {width}x{height} is above the limit of {max_pixels} pixels")
    return kind, height, width


def _check_whole(kind: str, data: bytes, name: Path | str) -> None:
    """Refuses a file whose end is missing, where OpenCV may decode what is there and stay silent."""
    if kind == "PNG" and data.rfind(_PNG_END) < 0:
        raise InputError(f"{name}: truncated; the PNG's last chunk is missing")
    if kind in ("JPEG", "MPO") and not _jpeg_ends(data):
        raise InputError(f"{name}: truncated; the JPEG's end is missing")


def _checked_tiff(data: bytes, name: Path | str, max_pixels: int) -> Image | None:
    """Refuses a damaged TIFF: OpenCV returns what it could read (seen with 5.0), so Pillow reads it once, strictly.

    Returns:
        The pixels, of one with alpha: OpenCV multiplies them by it. None of others.
    """
    try:
        with _calm_pillow(max_pixels), PIL.Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode not in ("RGBA", "LA"):
                return None
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    except Exception as exc:
        raise InputError(f"{name}: the TIFF is damaged or truncated ({_one_line(exc)})") from exc


def _jpeg_ends(data: bytes) -> bool:
    """Whether an end marker follows the first scan; a thumbnail in the EXIF block brings one of its own before it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # start of scan
            return data.rfind(_JPEG_END, at) >= 0
        if marker == 0xFF:  # fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _one_line(exc: BaseException) -> str:
    return " ".join(str(getattr(exc, "err", "") or exc).split()) or type(exc).__name__
