"""The GPU kernel on a GPU, without TensorRT: the PTX that goes into engines, launched by the driver."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_cases import CASES, FAR, Array, Case, assert_equal

from ddsm_deploy.kernels import cuda

pytestmark = pytest.mark.gpu


def run(tensors: list[Array], chunk: int | None = None) -> Array:
    """What the kernel makes of them."""
    from cuda.bindings import driver

    from ddsm_deploy.engines.cuda import DeviceMemory, Stream, require_gpu

    def check(result: tuple) -> object:
        assert result[0] == driver.CUresult.CUDA_SUCCESS, result[0].name
        return result[1] if len(result) > 1 else None

    query, _, value, offset = tensors
    b, k, y, x = query.shape
    v, n = value.shape[1], offset.shape[1] // 2
    names = {np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16"}
    gpu = require_gpu()
    ptx = cuda.compile_ptx(
        elements=names[query.dtype],
        offsets=names[offset.dtype],
        samples=n,
        compute_capability=gpu.compute_capability,
    )
    stream = Stream()
    inputs = [DeviceMemory(tensor.nbytes) for tensor in tensors]
    out = DeviceMemory(value.nbytes)  # after that the device's own context is there, into which the module goes
    module = check(driver.cuModuleLoadData(ptx + b"\0"))
    try:
        kernel = check(driver.cuModuleGetFunction(module, cuda.KERNEL.encode()))
        for memory, tensor in zip(inputs, tensors, strict=True):
            stream.copy(memory.address, np.ascontiguousarray(tensor).ctypes.data, tensor.nbytes)
        numbers = [np.array([number], dtype=np.int32) for number in (y, x, k, v, chunk or v)]
        pointers = [np.array([memory.address], dtype=np.uint64) for memory in (*inputs, out)]
        arguments = np.array([a.ctypes.data for a in (*pointers[:4], *numbers, pointers[4])], dtype=np.uint64)
        grid = (-(-y * x // cuda.LANES), -(-v // (chunk or v)), b)
        check(driver.cuLaunchKernel(kernel, *grid, cuda.THREADS, 1, 1, 0, stream.handle, arguments.ctypes.data, 0))
        result = np.empty_like(value)
        stream.copy(result.ctypes.data, out.address, result.nbytes)
        stream.wait()
    finally:
        driver.cuModuleUnload(module)
        stream.close()
        for memory in (*inputs, out):
            memory.close()
    return result


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_sizes(case: Case) -> None:
    tensors = case.tensors()
    assert_equal(run(tensors, case.chunk), tensors)


@pytest.mark.parametrize("n", range(1, 26))
def test_any_number_of_samples(n: int) -> None:
    tensors = Case(n=n, y=3, x=4).tensors()
    assert_equal(run(tensors), tensors)


@pytest.mark.parametrize("far", FAR, ids=str)
def test_far_offsets_read_zero(far: float) -> None:
    tensors = Case(n=4).tensors()
    tensors[3][:, ::2] = far
    assert not run(tensors).any()


@pytest.mark.parametrize("offset_kind", [np.float16, np.float32])
@pytest.mark.parametrize("n", [4, 9, 16])
def test_float16(n: int, offset_kind: type) -> None:
    tensors = Case(k=16, v=5, n=n, y=6, x=7).tensors(kind=np.float16, offset_kind=offset_kind)
    assert_equal(run(tensors), tensors, tolerance=2**-11 + 1e-5)


def test_a_map_of_the_pyramid() -> None:
    """A quarter of 360×480 with 64 channels."""
    tensors = Case(k=64, v=64, y=90, x=120).tensors()
    assert_equal(run(tensors), tensors)
