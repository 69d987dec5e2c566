"""ROS image messages to BGR, whatever their encoding, without ROS.

Source: sensor_msgs/image_encodings.hpp (names and layouts), OpenCV's colour conversions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from ddsm_deploy.errors import InputError
from ddsm_deploy.images import MAX_PIXELS, Image, decode_image


class _Layout(NamedTuple):
    dtype: str
    channels: int
    convert: int | None = None  # OpenCV's code from this layout to BGR; None: it is BGR


_LAYOUTS = {
    "bgr8": _Layout("u1", 3),
    "8UC3": _Layout("u1", 3),
    "rgb8": _Layout("u1", 3, cv2.COLOR_RGB2BGR),
    "bgra8": _Layout("u1", 4, cv2.COLOR_BGRA2BGR),
    "8UC4": _Layout("u1", 4, cv2.COLOR_BGRA2BGR),
    "rgba8": _Layout("u1", 4, cv2.COLOR_RGBA2BGR),
    "mono8": _Layout("u1", 1, cv2.COLOR_GRAY2BGR),
    "8UC1": _Layout("u1", 1, cv2.COLOR_GRAY2BGR),
    "bgr16": _Layout("u2", 3),
    "rgb16": _Layout("u2", 3, cv2.COLOR_RGB2BGR),
    "mono16": _Layout("u2", 1, cv2.COLOR_GRAY2BGR),
    "16UC1": _Layout("u2", 1, cv2.COLOR_GRAY2BGR),
    "bayer_rggb8": _Layout("u1", 1, cv2.COLOR_BayerRGGB2BGR),
    "bayer_bggr8": _Layout("u1", 1, cv2.COLOR_BayerBGGR2BGR),
    "bayer_gbrg8": _Layout("u1", 1, cv2.COLOR_BayerGBRG2BGR),
    "bayer_grbg8": _Layout("u1", 1, cv2.COLOR_BayerGRBG2BGR),
    "bayer_rggb16": _Layout("u2", 1, cv2.COLOR_BayerRGGB2BGR),
    "bayer_bggr16": _Layout("u2", 1, cv2.COLOR_BayerBGGR2BGR),
    "bayer_gbrg16": _Layout("u2", 1, cv2.COLOR_BayerGBRG2BGR),
    "bayer_grbg16": _Layout("u2", 1, cv2.COLOR_BayerGRBG2BGR),
    # two bytes a pixel, colour shared by two pixels of a row
    "yuv422": _Layout("u1", 2, cv2.COLOR_YUV2BGR_UYVY),
    "uyvy": _Layout("u1", 2, cv2.COLOR_YUV2BGR_UYVY),
    "yuv422_yuy2": _Layout("u1", 2, cv2.COLOR_YUV2BGR_YUY2),
    "yuyv": _Layout("u1", 2, cv2.COLOR_YUV2BGR_YUY2),
}

ENCODINGS = tuple(sorted(_LAYOUTS))
"""Encodings of sensor_msgs/Image that are read."""


def from_image_message(message: Any, *, max_pixels: int = MAX_PIXELS) -> Image:
    """A sensor_msgs/Image as uint8 H×W×3, BGR. Sixteen bits are scaled to eight; grey is repeated.

    Args:
        message: anything with its fields: height, width, encoding, is_bigendian, step, data.
        max_pixels: refuse larger ones.

    Raises:
        InputError: an encoding that is not an image's, or sizes that do not fit each other.
    """
    layout = _LAYOUTS.get(message.encoding)
    if layout is None:
        raise InputError(f"encoding is {message.encoding!r}; expected one of {', '.join(ENCODINGS)}")
    height, width, step = int(message.height), int(message.width), int(message.step)
    if not 0 < height * width <= max_pixels:
        raise InputError(f"an image of {width}x{height} pixels; expected 1 to {max_pixels} of them")
    numbers = np.dtype(layout.dtype).newbyteorder(">" if message.is_bigendian else "<")
    row = width * layout.channels * numbers.itemsize
    data = np.frombuffer(message.data, dtype=np.uint8)
    if step < row or data.size < step * (height - 1) + row:
        raise InputError(
            f"{data.size} bytes in rows of {step} are no {message.encoding} image of {width}x{height} "
            f"(rows of {row} at least)"
        )
    pixels: npt.NDArray[Any] = np.empty((height, row), np.uint8)
    whole = data[: step * (height - 1)].reshape(-1, step)[:, :row]
    pixels[:-1], pixels[-1] = whole, data[step * (height - 1) :][:row]  # the last row may lack its padding
    pixels = pixels.view(numbers).reshape(height, width, layout.channels)
    if numbers.itemsize == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    if layout.channels == 1:
        pixels = pixels[..., 0]
    if layout.convert is None:
        return pixels
    try:
        return cv2.cvtColor(pixels, layout.convert).astype(np.uint8, copy=False)
    except cv2.error as exc:  # a mosaic of one pixel, an odd width of yuv422
        raise InputError(f"{message.encoding} of {width}x{height} can't be converted ({exc.err})") from exc


def from_compressed_message(message: Any, *, max_pixels: int = MAX_PIXELS) -> Image:
    """A sensor_msgs/CompressedImage (JPEG, PNG) as uint8 H×W×3, BGR. EXIF orientation is left alone.

    Raises:
        InputError: it can't be decoded, is truncated, or larger than `max_pixels` by its header.
    """
    # not EXIF's orientation: a mask has to lie on the pixels as they are in the recording
    name = f"a compressed image ({message.format!r})"
    return decode_image(bytes(message.data), max_pixels=max_pixels, name=name, upright=False)
