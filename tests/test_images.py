"""Images of every usual kind are read as a viewer shows them; damaged ones are refused in one clear line."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from ddsm_deploy.errors import ImageTooLarge, InputError
from ddsm_deploy.images import decode_image, image_size, read_image, read_labels

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """BGR with other colours in each corner and smooth in between, so that JPEG keeps it within a few levels."""
    rows, columns = np.linspace(0, 1, HEIGHT)[:, None], np.linspace(0, 1, WIDTH)[None, :]
    planes = (200 * rows + 20 + 0 * columns, 180 * columns + 40 + 0 * rows, 100 * rows * columns + 60)
    return np.stack(planes, axis=-1).astype(np.uint8)


def encoded(suffix: str, image: np.ndarray) -> bytes:
    done, data = cv2.imencode(suffix, image)
    assert done
    return data.tobytes()


def pillow_bytes(image: np.ndarray, form: str, mode: str = "RGB", **settings: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[:, :, ::-1]).convert(mode).save(buffer, form, **settings)
    return buffer.getvalue()


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif"])
def test_lossless_kinds_come_back_exactly(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = write(tmp_path, f"a{suffix}", encoded(suffix, picture))
    assert np.array_equal(read_image(path), picture)
    assert image_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("WEBP", "RGB"), ("JPEG", "CMYK"), ("TIFF", "CMYK")])
def test_lossy_and_cmyk_kinds_come_back_nearly(tmp_path: Path, picture: np.ndarray, form: str, mode: str) -> None:
    path = write(tmp_path, "a", pillow_bytes(picture, form, mode, quality=95))
    read = read_image(path)
    assert read.shape == picture.shape
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - picture).mean() < 4


def test_grey_is_repeated_and_alpha_dropped(tmp_path: Path, picture: np.ndarray) -> None:
    grey = picture[:, :, 0].copy()
    assert np.array_equal(read_image(write(tmp_path, "g.png", encoded(".png", grey))), np.dstack([grey] * 3))
    alpha = np.dstack([picture, np.full((HEIGHT, WIDTH), 7, np.uint8)])
    assert np.array_equal(read_image(write(tmp_path, "a.png", encoded(".png", alpha))), picture)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_is_scaled_to_8(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = write(tmp_path, f"a{suffix}", encoded(suffix, picture.astype(np.uint16) * 257))  # 255 -> 65535
    assert np.abs(read_image(path).astype(int) - picture).max() <= 1


@pytest.mark.parametrize("kind", [2, 3, 5, 6])
@pytest.mark.parametrize("white", [1, 100, 255, 1023, 4095, 65535])
def test_pnm_of_any_depth(tmp_path: Path, kind: int, white: int) -> None:
    """Netpbm's pgm(5) and ppm(5): samples are numbers up to white's, of two bytes, high one first, where it is above
    255; comments may stand in the header."""
    samples = np.linspace(0, white, 4).astype(int)
    repeated = np.repeat(samples, 3) if kind in (3, 6) else samples
    if kind < 5:
        body = b" ".join(b"%d" % sample for sample in repeated) + b"\n"
    else:
        body = repeated.astype(">u2" if white > 255 else "u1").tobytes()
    data = b"P%d # made by hand\n# 9 9\n4 1\n%d\n" % (kind, white) + body
    read = read_image(write(tmp_path, "a.pnm", data))
    assert read.shape == (1, 4, 3)
    assert np.abs(read[0] - (samples * 255 / white)[:, None]).max() <= 1
    with pytest.raises(InputError):
        read_image(write(tmp_path, "cut.pnm", data[: -len(body) // 2]))


@pytest.mark.parametrize("kind", [1, 2, 4, 5, 6])
def test_a_pnm_that_two_readers_take_for_two_sizes_is_refused(kind: int) -> None:
    """Pillow, which reads the size, ends a number at a comment's sign; OpenCV, which decodes, does not."""
    white = b"" if kind in (1, 4) else b"255\n"
    data = b"P%d\n100#80\n 1\n" % kind + white + bytes(24_000)
    with pytest.raises(InputError, match="set it on a line of its own"):
        decode_image(data, max_pixels=500)


@pytest.mark.parametrize("alpha", [0, 128, 255])
@pytest.mark.parametrize("kind", ["RGBA", "LA"])
def test_alpha_of_a_tiff_is_dropped(tmp_path: Path, picture: np.ndarray, kind: str, alpha: int) -> None:
    own = picture[..., ::-1] if kind == "RGBA" else picture[..., :1]
    image = PIL.Image.fromarray(np.dstack([own, np.full((HEIGHT, WIDTH), alpha, np.uint8)]))
    assert image.mode == kind
    image.save(tmp_path / "a.tif")
    wanted = picture if kind == "RGBA" else np.repeat(picture[..., :1], 3, axis=2)
    assert np.array_equal(read_image(tmp_path / "a.tif"), wanted)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(
    tmp_path: Path, picture: np.ndarray, form: str, orientation: int, turn: int
) -> None:
    """EXIF 2.32, tag 0x0112: 6 says that the stored picture is to be turned by 90° clockwise to show it."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path, "a", pillow_bytes(picture, form, exif=exif))
    read = read_image(path)
    wanted = np.rot90(picture, turn)
    assert read.shape == wanted.shape
    assert np.abs(read.astype(int) - wanted).mean() < 4
    assert sorted(image_size(path)) == [HEIGHT, WIDTH]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".tif", ".ppm"])
@pytest.mark.parametrize("kept", [0.99, 0.9, 0.5, 0.1])
def test_truncated_files_are_refused(tmp_path: Path, picture: np.ndarray, suffix: str, kept: float) -> None:
    data = encoded(suffix, picture)
    path = write(tmp_path, f"a{suffix}", data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"a\.\w+: "):
        read_image(path)


def test_jpeg_that_lacks_only_its_end_is_refused_even_with_a_thumbnail_inside(
    tmp_path: Path, picture: np.ndarray
) -> None:
    """The thumbnail in the EXIF block has an end marker too, which must not be taken for the picture's."""
    thumbnail = encoded(".jpg", picture)
    tiff = b"II*\0" + struct.pack("<I", 8) + struct.pack("<HI", 0, 14) + thumbnail
    block = b"Exif\0\0" + tiff
    whole = encoded(".jpg", np.tile(picture, (4, 4, 1)))
    photo = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:]
    assert read_image(write(tmp_path, "whole.jpg", photo)).shape == (4 * HEIGHT, 4 * WIDTH, 3)
    with pytest.raises(InputError, match="truncated"):
        read_image(write(tmp_path, "cut.jpg", photo[:-2]))
    with pytest.raises(InputError, match=r"header\.jpg: "):
        read_image(write(tmp_path, "header.jpg", photo[: len(block) + 30]))


def test_trailing_bytes_do_no_harm(tmp_path: Path, picture: np.ndarray) -> None:
    for suffix in (".png", ".jpg"):
        path = write(tmp_path, f"a{suffix}", encoded(suffix, picture) + b"appended by a camera")
        assert read_image(path).shape == picture.shape


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_damaged_inside_is_refused(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    data = bytearray(
        encoded(suffix, cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, picture.shape, np.uint8), (3, 3), 0))
    )
    for at in range(len(data) // 2, len(data) // 2 + 40):
        data[at] ^= 0x55
    with pytest.raises(InputError, match=rf"a\{suffix}: "):
        read_image(write(tmp_path, f"a{suffix}", bytes(data)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"hello, this is text and no picture at all", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "a.png: "),
        (b"\xff\xd8", "a.png: "),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "a.png: "),
    ],
)
def test_what_is_no_image_is_said_so(tmp_path: Path, data: bytes, said: str) -> None:
    path = write(tmp_path, "a.png", data)
    for read in (read_image, image_size, read_labels):
        with pytest.raises(InputError, match=said):
            read(path)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    """A PNG of 40000×40000 zeros takes little room here and 4.8 GB decoded."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(120_001) * 8, 9))
    bomb = write(tmp_path, "bomb.png", b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    for read in (read_image, image_size):
        with pytest.raises(InputError, match="limit of 100000000 pixels"):
            read(bomb)


def test_stated_pixel_limit(tmp_path: Path, picture: np.ndarray) -> None:
    path = write(tmp_path, "a.png", encoded(".png", picture))
    assert read_image(path, max_pixels=HEIGHT * WIDTH).shape == picture.shape
    with pytest.raises(InputError, match=f"{WIDTH}x{HEIGHT} is above the limit of {HEIGHT * WIDTH - 1} pixels"):
        read_image(path, max_pixels=HEIGHT * WIDTH - 1)


def test_a_limit_above_pillows_own(tmp_path: Path) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    large = write(tmp_path, "a.png", b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert image_size(large, max_pixels=400_000_000) == (20_000, 20_000)
    with pytest.raises(InputError, match="20000x20000 is above the limit of 399999999 pixels"):
        image_size(large, max_pixels=399_999_999)
    with pytest.raises(InputError, match="limit of 300 pixels"):
        image_size(large, max_pixels=300)


def test_a_file_far_larger_than_its_header_says_is_not_read(tmp_path: Path, picture: np.ndarray) -> None:
    path = write(tmp_path, "a.png", encoded(".png", picture))
    os.truncate(path, 10_000_000_000)  # sparse: takes no room on the disk
    with pytest.raises(InputError, match="9536 MiB hold no image within the limit"):
        read_image(path)


def test_paths_that_are_no_plain_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    for name, said in (
        ("x.png", "a folder"),
        ("dangling.png", "a link to nothing"),
        ("missing.png", "no such file"),
        ("pipe.png", "not a plain file"),
        ("n" * 300 + ".png", "too long"),
    ):
        for read in (read_image, image_size):
            with pytest.raises(InputError, match=said):
                read(tmp_path / name)


def test_unicode_and_undecodable_names(tmp_path: Path, picture: np.ndarray) -> None:
    for name in ("straße 日本 🚗.png", os.fsdecode(b"\xff\xfe.png"), "new\nline.png"):
        assert np.array_equal(read_image(write(tmp_path, name, encoded(".png", picture))), picture)


def test_bytes_are_read_as_a_file_is(tmp_path: Path, picture: np.ndarray) -> None:
    for suffix in (".png", ".jpg", ".tif"):
        data = encoded(suffix, picture)
        assert np.array_equal(decode_image(data), read_image(write(tmp_path, f"a{suffix}", data)))


def test_bytes_that_are_no_image() -> None:
    for data, why in ((b"", "empty"), (b"no image", "not an image")):
        with pytest.raises(InputError, match=f"^upload: {why}"):
            decode_image(data, name="upload")


def test_too_many_pixels_are_told_apart(picture: np.ndarray) -> None:
    data = encoded(".png", picture)
    assert decode_image(data, max_pixels=HEIGHT * WIDTH).shape == picture.shape
    with pytest.raises(ImageTooLarge, match=f"{WIDTH}x{HEIGHT} is above the limit"):
        decode_image(data, max_pixels=HEIGHT * WIDTH - 1)
    with pytest.raises(InputError, match="truncated"):
        decode_image(data[:-20])


def test_reading_from_many_threads(tmp_path: Path, picture: np.ndarray) -> None:
    """The header is read with Python's warnings held still, which is process-wide state."""
    paths = [write(tmp_path, f"{i}{s}", encoded(s, picture)) for i in range(20) for s in (".png", ".tif", ".jpg")]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {image.shape for image in pool.map(read_image, paths)} == {picture.shape}


def test_labels_keep_palette_indices(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = PIL.Image.fromarray(ids)
    image.putpalette([value for i in range(12) for value in (255 - i, i, 7)])
    image.save(tmp_path / "labels.png")
    assert np.array_equal(read_labels(tmp_path / "labels.png"), ids)


def test_labels_of_another_kind_are_refused(tmp_path: Path, picture: np.ndarray) -> None:
    with pytest.raises(InputError, match="this one is RGB"):
        read_labels(write(tmp_path, "a.png", encoded(".png", picture)))
    data = encoded(".png", picture[:, :, 0].copy())
    with pytest.raises(InputError, match="can't be decoded"):
        read_labels(write(tmp_path, "b.png", data[: len(data) // 2]))
