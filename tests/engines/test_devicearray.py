"""Arrays of other libraries as plain memory. What needs no GPU is tried on numpy's own DLPack capsules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddsm_deploy.engines.base import TensorInfo
from ddsm_deploy.errors import InputError

MASK = TensorInfo(name="mask", dtype=np.dtype(np.uint8), shape=(None, 4, 6))


@pytest.fixture(autouse=True)
def _cuda(need) -> None:
    need("cuda")


class OnGpu:
    """Something that says of itself where its memory lies, as CuPy's arrays do; nothing here follows the address."""

    def __init__(self, **fields: Any) -> None:
        plain = {"shape": (1, 4, 6), "typestr": "|u1", "data": (4096, False), "version": 3}
        self.__cuda_array_interface__ = {**plain, **fields}


def test_the_interface_of_cupy_and_torch() -> None:
    from ddsm_deploy.engines.devicearray import check_fit, view

    array = OnGpu(stream=7)
    found = view(array, name="mask", stream=1)
    assert (found.address, found.shape, found.dtype, found.stream) == (4096, (1, 4, 6), np.uint8, 7)
    assert found.owner is array
    check_fit(found, MASK)
    assert view(OnGpu(strides=(24, 6, 1)), name="mask", stream=1).stream is None
    assert view(OnGpu(strides=(99, 6, 1)), name="mask", stream=1)  # the stride of an axis of one element is no matter


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strides": (24, 1, 4)}, "not C-contiguous"),
        ({"data": (4096, True)}, "read-only"),
        ({"mask": object()}, "a masked array"),
        ({"typestr": "what"}, "can't be read"),
        ({"data": 4096}, "can't be read"),
    ],
)
def test_what_the_interface_may_not_say(fields: dict[str, Any], said: str) -> None:
    from ddsm_deploy.engines.devicearray import view

    with pytest.raises(InputError, match=said):
        view(OnGpu(**fields), name="mask", stream=1, writable=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.int64, np.bool_])
def test_dlpack_capsules_are_read_right(dtype: type) -> None:
    from ddsm_deploy.engines.devicearray import from_capsule

    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    found = from_capsule(array.__dlpack__(), name="x")
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert found.address == array.ctypes.data
    part = array[1:]  # begins further on
    assert from_capsule(part.__dlpack__(), name="x").address == part.ctypes.data


def test_work_under_way_is_waited_for() -> None:
    """PyTorch's interface names no stream, so its DLPack is asked: given the stream, it makes that wait."""
    from ddsm_deploy.engines.devicearray import view

    class OfTorch(OnGpu):
        asked: int | None = None

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: int) -> Any:
            self.asked = stream
            return np.zeros((1, 4, 6), np.uint8).__dlpack__()

    array = OfTorch(version=2)
    assert view(array, name="mask", stream=7).owner is not array
    assert array.asked == 7
    with pytest.raises(InputError, match="read-only"):
        view(OfTorch(data=(4096, True)), name="mask", stream=7, writable=True)


def test_dlpack_that_is_refused() -> None:
    from ddsm_deploy.engines.devicearray import from_capsule, view

    with pytest.raises(InputError, match="not C-contiguous"):
        from_capsule(np.zeros((3, 4)).T.__dlpack__(), name="x")
    with pytest.raises(InputError, match="DLPack type that numpy lacks"):
        from_capsule(np.zeros(3, np.complex64).__dlpack__(), name="x")
    with pytest.raises(InputError, match="'x' is a ndarray in the memory of another device"):
        view(np.zeros(3), name="x", stream=1)
    with pytest.raises(InputError, match="'x' is a list; expected an array on the GPU"):
        view([1, 2], name="x", stream=1)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"shape": (1, 4, 7)}, None), ({"typestr": "<f4"}, None), ({}, (2, 4, 6)), ({"shape": (4, 6)}, None)],
)
def test_what_does_not_fit_its_tensor(fields: dict[str, Any], wanted: tuple[int, ...] | None) -> None:
    from ddsm_deploy.engines.devicearray import check_fit, view

    with pytest.raises(InputError, match=r"'mask' is (uint8|float32) [\dx]+; expected uint8 [?2]x4x6"):
        check_fit(view(OnGpu(**fields), name="mask", stream=1), MASK, wanted)


@pytest.mark.gpu
def test_memory_of_our_own() -> None:
    from ddsm_deploy.engines import cuda
    from ddsm_deploy.engines.devicearray import DeviceArray, view

    cuda.require_gpu()
    data = np.random.default_rng(0).integers(0, 256, (3, 40), dtype=np.uint8)
    array, stream = DeviceArray(data.shape, data.dtype), cuda.Stream()
    found = view(array, name="x", stream=stream.handle, writable=True)
    assert (found.shape, found.dtype) == (data.shape, data.dtype)
    back = np.zeros_like(data)
    stream.copy(found.address, data.ctypes.data, data.nbytes)
    stream.copy(back.ctypes.data, found.address, data.nbytes)
    stream.wait()
    np.testing.assert_array_equal(back, data)
    array.close()
    array.close()
    stream.close()
