"""Every encoding of sensor_msgs/Image comes out as the picture that was put in."""

from __future__ import annotations

import types
from typing import Any

import cv2
import numpy as np
import pytest

from ddsm_deploy.errors import InputError
from ddsm_deploy.streams.encodings import ENCODINGS, from_compressed_message, from_image_message


def picture(height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth in each channel, so that mosaics and shared colours lose little, and different in all three."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 200 // width], 2).astype(np.uint8)


def message(data: np.ndarray, encoding: str, *, padding: int = 0, big: bool = False) -> types.SimpleNamespace:
    """As ROS lays an image out: rows of `step` bytes, `padding` of them unused."""
    height, width = data.shape[:2]
    rows = data.view(np.uint8).reshape(height, -1)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=77)
    return types.SimpleNamespace(
        height=height, width=width, encoding=encoding, is_bigendian=int(big), step=rows.shape[1], data=rows.tobytes()
    )


def encode(bgr: np.ndarray, encoding: str, big: bool) -> np.ndarray:
    """The definition of each encoding, written out by hand."""
    b, g, r = (bgr[..., i] for i in range(3))
    full = np.full_like(b, 255)
    grey = np.round(0.299 * r + 0.587 * g + 0.114 * b).astype(np.uint8)
    name = encoding.lower()
    if "bayer" in name:
        pattern = name.split("_")[1].rstrip("168")
        mosaic = np.empty_like(b)
        for place, colour in enumerate(pattern):
            y, x = divmod(place, 2)
            mosaic[y::2, x::2] = {"r": r, "g": g, "b": b}[colour][y::2, x::2]
        result = mosaic
    elif name in ("yuv422", "uyvy", "yuv422_yuy2", "yuyv"):  # BT.601, video range, as V4L2 has it
        luma = 16 + 0.257 * r + 0.504 * g + 0.098 * b
        u = 128 - 0.148 * r - 0.291 * g + 0.439 * b
        v = 128 + 0.439 * r - 0.368 * g - 0.071 * b
        colour = np.empty_like(luma)
        colour[:, 0::2], colour[:, 1::2] = u[:, 0::2], v[:, 0::2]
        pair = (colour, luma) if name in ("yuv422", "uyvy") else (luma, colour)
        result = np.round(np.stack(pair, 2)).astype(np.uint8)
    else:
        result = {
            "bgr8": bgr, "8uc3": bgr, "bgr16": bgr,
            "rgb8": np.stack([r, g, b], 2), "rgb16": np.stack([r, g, b], 2),
            "bgra8": np.stack([b, g, r, full], 2), "8uc4": np.stack([b, g, r, full], 2),
            "rgba8": np.stack([r, g, b, full], 2),
            "mono8": grey, "8uc1": grey, "mono16": grey, "16uc1": grey,
        }[name]  # fmt: skip
    if "16" in name:
        result = (result.astype(np.uint16) * 257).astype(">u2" if big else "<u2")
    return np.ascontiguousarray(result)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_encoding(encoding: str, padding: int, big: bool) -> None:
    bgr = picture()
    encoded = encode(bgr, encoding, big)
    if encoding in ("mono8", "mono16", "8UC1", "16UC1"):
        bgr = np.repeat(encode(bgr, "mono8", False)[..., None], 3, axis=2)
    got = from_image_message(message(encoded, encoding, padding=padding, big=big))
    assert got.dtype == np.uint8 and got.shape == bgr.shape
    lossy = "bayer" in encoding or "yuv" in encoding.lower() or "uyvy" in encoding or "yuyv" in encoding
    inner = np.s_[2:-2, 2:-2]  # a mosaic's rim has no neighbours
    off = np.abs(got[inner].astype(int) - bgr[inner])
    assert off.max() <= (12 if lossy else 0), off.max()


def test_the_last_row_may_lack_its_padding() -> None:
    bgr = picture()
    whole = message(bgr, "bgr8", padding=7)
    whole.data = whole.data[:-7]
    assert (from_image_message(whole) == bgr).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoding": "32FC1"}, "encoding is '32FC1'; expected one of"),
        ({"step": 20}, "in rows of 20"),
        ({"height": 25}, "no bgr8 image of 32x25"),
        ({"width": 0}, "image of 0x24"),
        ({"data": b""}, "0 bytes"),
        ({"height": 2**31, "width": 2**31}, "expected 1 to"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    wrong = message(picture(), "bgr8")
    vars(wrong).update(changes)
    with pytest.raises(InputError, match=words):
        from_image_message(wrong)


def test_odd_widths_of_shared_colour_are_refused() -> None:
    with pytest.raises(InputError, match="yuv422 of 31x24 can't be converted"):
        from_image_message(message(np.zeros((24, 31, 2), np.uint8), "yuv422"))


@pytest.mark.parametrize("kind", [".png", ".jpg"])
def test_compressed(kind: str) -> None:
    bgr = picture()
    data = cv2.imencode(kind, bgr)[1].tobytes()
    got = from_compressed_message(types.SimpleNamespace(format="bgr8; compressed", data=data))
    assert np.abs(got.astype(int) - bgr).max() <= (0 if kind == ".png" else 10)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_damaged_compressed_images_are_refused(data: bytes) -> None:
    with pytest.raises(InputError, match="a compressed image"):
        from_compressed_message(types.SimpleNamespace(format="jpeg", data=data))
