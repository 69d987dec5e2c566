"""The GPU kernel of the sampling operator beside its GridSample form in PyTorch, on a GPU.

    python benchmarks/gpu_sampling.py [--json FILE]

For the maps of the pyramid's finest level at several input sizes: both results against float64 (largest error over the
largest number), the median milliseconds of each (CUDA events around 20 calls; the two take turns), and the ratio. The
form in PyTorch is what the network trains with on a GPU: float32 inside, eager, one kernel after another. Needs torch
with CUDA, cuda-bindings and NVRTC; TensorRT is not involved.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda.bindings import driver
from torch import Tensor

from ddsm_deploy.engines.cuda import require_gpu
from ddsm_deploy.kernels import cuda
from ddsm_deploy.model.operator import reference

SIZES = {"360x480": (90, 120), "720x960": (180, 240), "1024x2048": (256, 512)}
K, V, N = 32, 64, 9
ROUNDS, CALLS = 15, 20
KINDS = {"fp32": torch.float32, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    gpu = require_gpu()
    torch.cuda.init()
    print(f"{gpu}; torch {torch.__version__}; K={K} V={V} N={N}, batch 1")
    print("| input | type | kernel ms | PyTorch ms | ratio | error of kernel | error of PyTorch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for size, (y, x) in SIZES.items():
        for name in KINDS:
            row = {"input": size, "type": name, **_row(y, x, name, gpu.compute_capability)}
            rows.append(row)
            print(
                f"| {size} | {name} | {row['kernel_ms']:.3f} | {row['torch_ms']:.3f} | {row['ratio']:.1f} | "
                f"{row['kernel_error']:.1e} | {row['torch_error']:.1e} |"
            )
    if args.json:
        args.json.write_text(json.dumps({"gpu": str(gpu), "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


def _row(y: int, x: int, name: str, compute_capability: str) -> dict[str, float]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, c, y, x) for c in (K, K, V, 2 * N)]
    inputs = [torch.randn(shape, generator=generator, device="cuda").to(KINDS[name]) for shape in shapes]
    launch, out = _launcher(inputs, name, compute_capability)
    exact = reference(*(tensor.double() for tensor in inputs))
    out.fill_(float("nan"))  # a number that was not written shows
    launch()
    times: dict[str, list[float]] = {"kernel": [], "torch": []}
    for _ in range(ROUNDS + 1):
        times["kernel"].append(_time(launch))
        times["torch"].append(_time(lambda: reference(*inputs)))
    kernel, other = (statistics.median(values[1:]) for values in times.values())  # the first is warming up
    return {
        "kernel_ms": kernel,
        "torch_ms": other,
        "ratio": other / kernel,
        "kernel_error": _error(out, exact),
        "torch_error": _error(reference(*inputs), exact),
    }


def _launcher(inputs: list[Tensor], name: str, compute_capability: str) -> tuple[Callable[[], None], Tensor]:
    """A call of the kernel on torch's stream, and where it writes."""
    ptx = cuda.compile_ptx(elements=name, offsets=name, samples=N, compute_capability=compute_capability)
    module = _check(driver.cuModuleLoadData(ptx + b"\0"))
    kernel = _check(driver.cuModuleGetFunction(module, cuda.KERNEL.encode()))
    y, x = inputs[0].shape[-2:]
    out = torch.empty_like(inputs[2])
    numbers = [np.array([number], np.int32) for number in (y, x, K, V, V)]
    pointers = [np.array([tensor.data_ptr()], np.uint64) for tensor in (*inputs, out)]
    values = (*pointers[:4], *numbers, pointers[4])
    arguments = np.array([value.ctypes.data for value in values], np.uint64)
    grid = (-(-y * x // cuda.LANES), 1, 1)

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        _check(driver.cuLaunchKernel(kernel, *grid, cuda.THREADS, 1, 1, 0, stream, arguments.ctypes.data, 0))
        launch.__dict__["keep"] = values  # what `arguments` points to

    return launch, out


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds a call, of CALLS in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / CALLS


def _error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max() / exact.abs().max())


def _check(result: tuple[Any, ...]) -> Any:
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA's driver: {result[0].name}")
    return result[1] if len(result) > 1 else None


if __name__ == "__main__":
    main()
