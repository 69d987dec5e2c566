"""`dynamic_sample_attention` as a TensorRT plugin: the project's CUDA kernel in the engine instead of GridSample.

Experimental, as is NVIDIA's interface for it (`tensorrt.plugin`, TensorRT 10.9 or later): no GPU has built or run it
yet. What is tested without one: that NVIDIA's bindings of versions 10 and 11 take the definitions below and what they
return, that NVRTC compiles the kernel, and, on CPUs, what the kernel computes.

It is of the ahead-of-time kind. NVRTC makes PTX for the GPU while the engine is built, and TensorRT keeps the PTX, and
how it is launched, inside the engine; so, as NVIDIA has it, an engine needs neither this file nor NVRTC to run.
Attributes of such a plugin are not kept, and it has none: all it must know are its inputs' shapes.

The child process of a build imports this (see `worker`), and NVIDIA's library is handed in.
"""

from __future__ import annotations

import importlib
import math
import types
from typing import Any

from ddsm_deploy.errors import BackendError
from ddsm_deploy.kernels.cuda import KERNEL, LANES, THREADS, compile_ptx, compiler_version
from ddsm_deploy.onnxfile import SAMPLING_DOMAIN, SAMPLING_OP

PLUGIN = f"{SAMPLING_DOMAIN}::{SAMPLING_OP}"
INPUTS = ("query", "key", "value", "offset")

SMALL_MAP, SMALL_CHUNK = 256, 16
"""A map of at most so many pixels fills too few blocks, so its V is split into chunks of so many channels. Not
measured."""


def check_driver(driver: str) -> None:
    """Makes sure that a driver will read what NVRTC makes here.

    Args:
        driver: the newest CUDA version that it serves, as ``13.0``.

    Raises:
        BackendError: it will not, or NVRTC is not installed.
    """
    compiler = compiler_version()
    if compiler > tuple(map(int, driver.split("."))):
        raise BackendError(
            f"NVRTC {'.'.join(map(str, compiler))} is newer than what this GPU's driver serves, CUDA {driver}; install "
            "an older nvidia-cuda-nvrtc, or a newer driver"
        )


def register(trt: Any, compute_capability: str, *, lazy: bool = False) -> None:
    """Makes the plugin known to this process's TensorRT, once.

    Args:
        trt: the module `tensorrt`.
        compute_capability: of the GPU that the engine is built on, as ``86``.
        lazy: define it without entering it into the registry, which needs NVIDIA's library: for tests.

    Raises:
        BackendError: this TensorRT has no plugins of this kind.
    """
    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise BackendError(
            f"it has no plugins that are compiled ahead of time; 10.9 brought them, this is {trt.__version__}"
        )
    plugins = importlib.import_module(f"{trt.__name__}.plugin")

    def describe(query: Any, key: Any, value: Any, offset: Any) -> Any:
        return value.like()

    def implement(query: Any, key: Any, value: Any, offset: Any, outputs: Any, tactic: Any) -> Any:
        return launch(trt, plugins, (query, key, value, offset), compute_capability)

    # NVIDIA's decorators look at the types themselves; as annotations they would be texts here
    describe.__annotations__ = dict.fromkeys((*INPUTS, "return"), plugins.TensorDesc)
    result = (str | bytes, str | bytes, plugins.KernelLaunchParams, plugins.SymExprs)
    implement.__annotations__ = {"return": types.GenericAlias(tuple, result)}
    plugins.register(PLUGIN, lazy_register=lazy)(describe)
    plugins.aot_impl(PLUGIN)(implement)


def launch(trt: Any, plugins: Any, inputs: tuple[Any, ...], compute_capability: str) -> tuple[str, bytes, Any, Any]:
    """The kernel for inputs of these shapes and types: its name, its PTX, its grid, and the numbers that it is given.

    Sizes stay symbols, so batch, height and width may be open.

    Raises:
        BackendError: the inputs' types are none of the kernel's; or as `compile_ptx`.
        ConfigError: more samples than the kernel takes.
    """
    query, key, value, offset = inputs
    words = {trt.float32: "fp32", trt.float16: "fp16"}
    elements = {words.get(tensor.dtype, str(tensor.dtype)) for tensor in (query, key, value)}
    if len(elements) > 1:
        raise BackendError(f"query, key and value are of {' and '.join(sorted(elements))}; expected one type")
    ptx = compile_ptx(
        elements=elements.pop(),
        offsets=words.get(offset.dtype, str(offset.dtype)),
        samples=offset.shape[1] // 2,
        compute_capability=compute_capability,
    )
    batch, channels, rows, columns = value.shape_expr
    chunk = chunk_of(tuple(value.shape))
    grid = plugins.KernelLaunchParams(
        grid_x=plugins.cdiv(rows * columns, LANES),
        grid_y=plugins.cdiv(channels, chunk),
        grid_z=batch,
        block_x=THREADS,
    )
    numbers = (rows, columns, query.shape_expr[1], channels, chunk)
    return KERNEL, ptx, grid, plugins.SymIntExprs.from_tuple([plugins.SymInt32(number) for number in numbers])


def chunk_of(shape: tuple[int, ...]) -> int:
    """How many channels of a result of that shape, B×V×Y×X with -1 for open axes, one block of the kernel makes."""
    small = -1 not in shape[2:] and math.prod(shape[2:]) <= SMALL_MAP
    return min(SMALL_CHUNK, shape[1]) if small else shape[1]
