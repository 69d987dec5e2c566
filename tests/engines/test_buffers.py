"""Where an engine's tensors lie in memory, and which sizes they may have."""

from __future__ import annotations

import numpy as np
import pytest

from ddsm_deploy.enginefile import Profile
from ddsm_deploy.engines.base import TensorInfo
from ddsm_deploy.engines.buffers import ALIGNMENT, byte_count, check_sizes, plan
from ddsm_deploy.errors import InputError

IMAGE = TensorInfo(name="image", dtype=np.dtype(np.uint8), shape=(None, None, None, 3))
MASK = TensorInfo(name="mask", dtype=np.dtype(np.uint8), shape=(None, None, None))
LOGITS = TensorInfo(name="logits", dtype=np.dtype(np.float32), shape=(None, 11, None, None))
PROFILE = Profile(min=(1, 128, 128, 3), opt=(1, 360, 480, 3), max=(4, 1024, 2048, 3))


def test_places_are_aligned_and_apart() -> None:
    made = plan([IMAGE, MASK, LOGITS], {"image": (1, 3, 5, 3), "mask": (1, 3, 5), "logits": (1, 11, 3, 5)})
    places = sorted(made.places.values(), key=lambda place: place.offset)
    assert [place.info.name for place in places] == ["image", "mask", "logits"]
    assert [place.capacity for place in places] == [45, 15, 660]  # 3·5·3, 3·5, 11·3·5 floats of 4 bytes
    assert [place.offset for place in places] == [0, 256, 512]
    assert all(place.offset % ALIGNMENT == 0 for place in places)
    assert made.total == 512 + 768


def test_a_full_place_takes_no_more_than_it_needs() -> None:
    made = plan([MASK], {"mask": (1, 16, 16)})
    assert made.total == byte_count(MASK, (1, 16, 16)) == 256


@pytest.mark.parametrize("shape", [None, (1, 2), (1, 2, 0), (1, 2, -1), (1, 2, 3, 4)])
def test_a_largest_shape_must_be_one_of_the_tensor(shape: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError, match="the largest shape of mask uint8 "):
        plan([MASK], {} if shape is None else {"mask": shape})


@pytest.mark.parametrize("shape", [(1, 128, 128, 3), (4, 1024, 2048, 3), (2, 360, 480, 3)])
def test_sizes_within_the_profile(shape: tuple[int, ...]) -> None:
    check_sizes(IMAGE, shape, PROFILE)
    check_sizes(IMAGE, (99, 9, 9, 3), None)  # fixed sizes are judged elsewhere


@pytest.mark.parametrize("shape", [(5, 360, 480, 3), (1, 127, 480, 3), (1, 360, 2049, 3)])
def test_sizes_beyond_the_profile(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as caught:
        check_sizes(IMAGE, shape, PROFILE)
    size = "x".join(map(str, shape))
    assert f"input 'image' is {size}; this engine was built for (1 to 4)x(128 to 1024)x(128 to 2048)x3" in str(
        caught.value
    )
    assert "build it with a wider --profile" in str(caught.value)
