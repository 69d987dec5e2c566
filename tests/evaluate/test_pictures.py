"""The picture of a comparison: it shows each change where it is, at sizes of all kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from colour_data import write_colour_data
from colour_graph import CLASSES, PALETTE, write_colour_model

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.evaluate.pictures import CELL_WIDTH, Comparison, draw_comparison, write_picture
from ddsm_deploy.evaluate.verify import VerifyOptions, verify
from ddsm_deploy.images import read_image
from ddsm_deploy.runtime.segmentation import Segmentation

MAGENTA = (255, 0, 255)
GREY = 90


def comparison(size: tuple[int, int], changed: tuple[slice, slice] | None, *, truth: bool = False) -> Comparison:
    """A grey frame on which A is green all over, and B red in one place."""
    a = np.ones(size, np.uint8)
    b = a.copy()
    if changed is not None:
        b[changed] = 0
    masks = [Segmentation(mask=mask, classes=CLASSES, palette=PALETTE) for mask in (a, b)]
    image = np.full((*size, 3), GREY, np.uint8)
    return Comparison(name="frame.png", image=image, a=masks[0], b=masks[1], truth=a if truth else None)


def magenta(picture: np.ndarray) -> np.ndarray:
    return (picture == MAGENTA).all(axis=2)


@pytest.mark.parametrize("scale", [1, 2])
def test_changes_are_where_they_belong(scale: int) -> None:
    """At the columns' own width and at half of it, where every pixel becomes four."""
    size = (240 // scale, CELL_WIDTH // scale)
    row = comparison(size, (slice(100 // scale, 120 // scale), slice(200 // scale, 240 // scale)))
    picture = draw_comparison([row], a="one", b="other")
    found = magenta(picture)
    assert found.sum() == 20 * 40
    rows, columns = (np.flatnonzero(found.any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == (20, 40)
    # the fourth column holds them, and A's and B's masks lie so many columns to the left
    pitch = (columns[0] - 200 - 8) // 3
    assert columns[0] == 8 + 3 * pitch + 200
    middle = (rows.mean().astype(int), columns.mean().astype(int))
    blue, green, red = picture[middle[0], middle[1] - 2 * pitch].astype(int)
    assert green > red > 0
    blue, green, red = picture[middle[0], middle[1] - pitch].astype(int)
    assert red > green > 0
    assert (picture[middle[0], middle[1] - 3 * pitch] == GREY).all()
    assert blue < red


def test_a_single_pixel_is_seen_in_a_large_frame() -> None:
    picture = draw_comparison([comparison((1000, 2000), (slice(500, 501), slice(700, 701)))], a="a", b="b")
    blue, green, red = (picture[..., channel].astype(int) for channel in range(3))
    assert ((red - green > 30) & (blue - green > 30)).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (300, 4), (97, 131)])
def test_frames_of_any_shape(size: tuple[int, int]) -> None:
    rows = [comparison(size, None, truth=True), comparison(size, (slice(None), slice(None)), truth=True)]
    picture = draw_comparison(rows, a="a" * 200, b="später")  # too long to fit, and beyond the font
    assert picture.dtype == np.uint8
    assert picture.shape[1] == draw_comparison(rows[:1], a="", b="").shape[1]
    assert magenta(picture).any()
    assert not magenta(draw_comparison(rows[:1], a="", b="")).any()


def test_no_frame() -> None:
    with pytest.raises(ConfigError, match="no frame to draw"):
        draw_comparison([], a="a", b="b")


def test_files(tmp_path: Path) -> None:
    picture = draw_comparison([comparison((20, 30), None)], a="a", b="b")
    write_picture(tmp_path / "worst.png", picture)
    np.testing.assert_array_equal(read_image(tmp_path / "worst.png"), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["worst.png"]
    with pytest.raises(ConfigError, match=r"ends in \.png"):
        write_picture(tmp_path / "worst.jpg", picture)
    with pytest.raises(InputError, match="can't be written"):
        write_picture(tmp_path / "worst.png" / "worst.png", picture)


def test_verify_draws_the_worst_frames(tmp_path: Path) -> None:
    """Two models that agree: the frames are drawn all the same, and nothing in them is marked."""
    data = write_colour_data(tmp_path / "data")
    bgr, rgb = (write_colour_model(tmp_path / f"{o}.onnx", size=(64, 96), channel_order=o) for o in ("bgr", "rgb"))
    file = tmp_path / "worst.png"
    assert verify(bgr, rgb, VerifyOptions(data=data, dataset="folder", keep_worst=2, picture=file)).changed == 0
    picture = read_image(file)
    assert not magenta(picture).any()
    assert 2 <= len(picture) // (64 * CELL_WIDTH // 96) < 3
