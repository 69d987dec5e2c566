"""The operator on this package's own CPU kernels, for tensors that they take. Dimension letters: see `operator.py`."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from ddsm_deploy import kernels

_TYPES = {torch.float32: kernels.F32, torch.bfloat16: kernels.BF16}


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels are there and take such tensors: on the CPU, float32 or bfloat16, N of at most 25."""
    *_, offset = tensors
    return (
        all(t.device.type == "cpu" and t.dtype in _TYPES for t in tensors)
        and offset.shape[1] <= 2 * kernels.MAX_SAMPLES
        and kernels.status().available
    )


def forward(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """See `operator.dynamic_sample_attention`; the result is laid out in memory as `value` is."""
    result = torch.empty_like(value)
    (out,) = _regular(result)
    inputs = _regular(query, key, value, offset)
    q, k, v, o = map(_view, inputs)
    kernels.forward(_sizes(*inputs), q, k, v, o, _view(out), _pool())
    return result if out is result else result.copy_(out)


def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the four inputs, in their types, from that of the output."""
    results = [torch.empty_like(t) for t in (query, key, value, offset)]
    grads = _regular(*results)
    grad, *inputs = _regular(grad, query, key, value, offset)
    views = tuple(map(_view, inputs))
    kernels.backward(_sizes(*inputs), views, _view(grad), tuple(map(_view, grads)), _pool())
    return tuple(to if to is one else to.copy_(one) for to, one in zip(results, grads, strict=True))


def _sizes(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> kernels.Sizes:
    b, k, y, x = query.shape
    return kernels.Sizes(b, k, value.shape[1], offset.shape[1] // 2, y, x)


def _regular(*tensors: Tensor) -> list[Tensor]:
    """The tensors themselves, or copies of those whose rows do not follow one another at the pitch of their pixels."""
    return [t if _pixel_stride(t) is not None else t.contiguous() for t in tensors]


def _pixel_stride(tensor: Tensor) -> int | None:
    *_, y, x = tensor.shape
    row, pixel = tensor.stride()[2:]
    if x == 1:
        return row
    return pixel if y == 1 or row == x * pixel else None


def _view(tensor: Tensor) -> kernels.View:
    image, channel = tensor.stride()[:2]
    return kernels.View(tensor.data_ptr(), image, channel, _pixel_stride(tensor) or 0, _TYPES[tensor.dtype])


def _pool() -> kernels.Pool | None:
    """torch's own threads: a second pool beside them would fight for the same cores."""
    threads = torch.get_num_threads()
    library = _openmp()
    return None if threads < 2 or library is None else kernels.gomp_pool(library, threads)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP runtime that torch has loaded, by the path from which it was; None where torch uses another."""
    for path in sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*")):
        return ctypes.CDLL(str(path))
    try:
        # never loads one: a runtime that torch does not use would bring threads of its own
        return ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
