"""Arrays on the GPU, of whichever library: taken in, and handed out, without any of these libraries.

Taken are objects with ``__cuda_array_interface__`` (CuPy, Numba, PyTorch and others; version 2 or 3) or with DLPack's
``__dlpack__`` (JAX as well). Given are `DeviceArray` objects, which these libraries take by the former.

Sources: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html and
https://dmlc.github.io/dlpack/latest/c_api.html (struct DLTensor).
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any

import numpy as np

from ddsm_deploy.engines.base import TensorInfo
from ddsm_deploy.engines.cuda import DeviceMemory
from ddsm_deploy.errors import InputError

_ON_GPU = {2: "CUDA", 13: "CUDA managed"}  # DLPack's device types whose memory a GPU reads by address
_CODES = {0: "i", 1: "u", 2: "f", 6: "b"}  # DLPack's type codes -> numpy's kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceView:
    """C-contiguous memory on the GPU that belongs to somebody else.

    Attributes:
        address: of the first byte.
        shape: in elements.
        dtype: of the elements.
        stream: what must be done before it is read or written: a stream's handle, or None where nothing is pending.
        owner: kept, so that the memory stays.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int | None
    owner: Any


class DeviceArray:
    """Memory on the GPU that belongs to this object; freed with it, or by `close`.

    Attributes:
        shape: in elements.
        dtype: of the elements.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._memory = DeviceMemory(math.prod(shape) * dtype.itemsize)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # stream None: it is handed out once all work on it is done
        data = (self._memory.address, False)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": data,
            "version": 3,
            "strides": None,
            "stream": None,
        }

    def close(self) -> None:
        """Frees the memory; whoever made a view of it must not use that any more."""
        self._memory.close()

    def __del__(self) -> None:
        if hasattr(self, "_memory"):  # not where getting it failed
            self._memory.close()


def view(value: Any, *, name: str, stream: int, writable: bool = False) -> DeviceView:
    """Somebody's array as plain memory.

    Args:
        value: the array.
        name: of the tensor, for messages.
        stream: handle of the stream that is going to use it; DLPack's exporters make theirs wait for it.
        writable: whether it is going to be written.

    Raises:
        InputError: it is no array on a GPU, not C-contiguous, or read-only and to be written.
    """
    interface = hasattr(value, "__cuda_array_interface__")
    if interface:
        described = _from_interface(value, name, writable)
    # DLPack where there are both: PyTorch's interface is of version 2, which names no stream to wait for
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind = int(value.__dlpack_device__()[0])
        if kind not in _ON_GPU:
            raise InputError(f"{name!r} is a {type(value).__name__} in the memory of another device, not of a CUDA GPU")
        return from_capsule(value.__dlpack__(stream=stream), name=name)
    if interface:
        return described
    raise InputError(
        f"{name!r} is a {type(value).__name__}; expected an array on the GPU (__cuda_array_interface__ or __dlpack__)"
    )


def from_capsule(capsule: Any, *, name: str) -> DeviceView:
    """What a DLPack capsule describes. The capsule stays its owner: its exporter frees the memory along with it.

    Raises:
        InputError: not a capsule of the unversioned form, or not C-contiguous.
    """
    try:
        tensor = _Tensor.from_address(_pointer(capsule, b"dltensor"))
    except ValueError as exc:
        raise InputError(f"{name!r} gives a DLPack capsule of a form not known here ({exc})") from exc
    if tensor.lanes != 1 or tensor.code not in _CODES or tensor.bits % 8:
        raise InputError(f"{name!r} is of a DLPack type that numpy lacks (code {tensor.code}, {tensor.bits} bits)")
    dtype = np.dtype(f"{_CODES[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim)) if tensor.strides else None
    _check_contiguous(shape, strides, dtype, name)
    address = (tensor.data or 0) + tensor.byte_offset
    return DeviceView(address=address, shape=shape, dtype=dtype, stream=None, owner=capsule)


def check_fit(found: DeviceView, info: TensorInfo, shape: tuple[int, ...] | None = None) -> None:
    """Refuses an array that is not the tensor it is given for; `shape` is the one wanted where `info` leaves axes open.

    Raises:
        InputError: its type or shape differs.
    """
    wanted = shape or info.shape
    fits = len(found.shape) == len(wanted) and all(
        got > 0 and want in (None, got) for got, want in zip(found.shape, wanted, strict=True)
    )
    if found.dtype != info.dtype or not fits:
        got = f"{found.dtype} {'x'.join(map(str, found.shape)) or 'scalar'}"
        wants = "x".join("?" if size is None else str(size) for size in wanted)
        raise InputError(f"{info.name!r} is {got}; expected {info.dtype} {wants}")


def _from_interface(value: Any, name: str, writable: bool) -> DeviceView:
    fields = value.__cuda_array_interface__
    try:
        address, read_only = fields["data"]
        shape, dtype = tuple(map(int, fields["shape"])), np.dtype(fields["typestr"])
        strides, stream = fields.get("strides"), fields.get("stream")
    except (KeyError, TypeError, ValueError) as exc:
        raise InputError(f"{name!r} gives a __cuda_array_interface__ that can't be read ({exc})") from exc
    if writable and read_only:
        raise InputError(f"{name!r} is read-only; expected an array to write to")
    if fields.get("mask") is not None:
        raise InputError(f"{name!r} is a masked array; expected a plain one")
    _check_contiguous(shape, strides, dtype, name)
    return DeviceView(address=int(address), shape=shape, dtype=dtype, stream=stream, owner=value)


def _check_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype[Any], name: str) -> None:
    if strides is None:
        return
    expected = dtype.itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            raise InputError(f"{name!r} is not C-contiguous (strides {tuple(strides)} bytes); make it so first")
        expected *= size


class _Tensor(ctypes.Structure):
    """DLPack's struct DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _pointer(capsule: Any, name: bytes) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return int(get(capsule, name))
