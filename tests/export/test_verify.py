"""The images that an export is verified on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.export import ExportOptions
from ddsm_deploy.export.verify import MAX_IMAGES, find_images, load_images, synthetic_images
from ddsm_deploy.spec import ModelSpec


def test_folders_are_searched_and_thinned_evenly(tmp_path: Path) -> None:
    for index in range(3 * MAX_IMAGES):
        folder = tmp_path / ("first" if index % 2 else "second")
        folder.mkdir(exist_ok=True)
        (folder / f"{index:03d}.PNG").touch()
    (tmp_path / "notes.txt").touch()
    found = find_images([tmp_path])
    assert len(found) == len(set(found)) == MAX_IMAGES
    assert {path.parent.name for path in found} == {"first", "second"}
    assert found[0].name == "001.PNG"
    assert found[-1].name == "094.PNG"


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image there"):
        find_images([tmp_path])
    with pytest.raises(InputError, match="no such file or folder"):
        find_images([tmp_path / "missing"])
    with pytest.raises(ConfigError, match="verification is off"):
        ExportOptions(verify=False, images=(tmp_path,))


@pytest.mark.parametrize(("order", "first"), [("bgr", 250), ("rgb", 10)])
def test_files_become_what_the_input_wants(tmp_path: Path, order: str, first: int) -> None:
    blue = np.full((50, 70, 3), (250, 100, 10), np.uint8)  # BGR, as OpenCV writes it
    cv2.imwrite(str(tmp_path / "blue.png"), blue)
    spec = ModelSpec(classes=("a",), height=32, width=48, channel_order=order)
    (image,) = load_images([tmp_path / "blue.png"], spec)
    assert (image.dtype, image.shape) == (np.uint8, (1, 32, 48, 3))
    assert image[0, 0, 0, 0] == first
    assert image.flags.c_contiguous  # torch takes no negative strides


def test_synthetic_images_vary_and_repeat() -> None:
    images = synthetic_images(40, 56)
    assert {image.shape for image in images} == {(1, 40, 56, 3)}
    assert all(image.std() > 20 for image in images)
    assert len({image.tobytes() for image in images}) == len(images)
    for image, again in zip(images, synthetic_images(40, 56), strict=True):
        np.testing.assert_array_equal(image, again)
