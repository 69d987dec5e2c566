"""The GPU kernel of `dynamic_sample_attention` (``src/attention.cuh``), and PTX made of it by NVRTC, without a GPU.

Experimental: its tests have run on one GPU, an H100, and its indexing is tested on CPUs; no TensorRT has run it yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.kernels import MAX_SAMPLES

__all__ = ["ELEMENTS", "KERNEL", "LANES", "THREADS", "compile_ptx", "compiler_version", "source"]

KERNEL = "ddsm_attention"
"""The kernel's name in the PTX. Its arguments: query, key, value, offset, Y, X, K, V, channels a block, result."""

LANES, THREADS = 32, 256
"""Pixels and threads of a block, as the source has them. A launch has ceil(Y·X / LANES) × ceil(V / channels) × B
blocks."""

ELEMENTS = {"fp32": "float", "fp16": "ddsm::Half"}
"""Types of elements and of offsets -> the source's words for them."""

_FOLDER = Path(__file__).parent / "src"
_HEADERS = ("attention.cuh", "locate.h")


def source(*, elements: str, offsets: str, samples: int) -> str:
    """A program of one kernel.

    Args:
        elements: of `ELEMENTS`: type of query, key, value and result.
        offsets: of `ELEMENTS`.
        samples: N, 1 to `MAX_SAMPLES`.

    Raises:
        ConfigError: one is not of those.
    """
    for name, kind in (("elements", elements), ("offsets", offsets)):
        if kind not in ELEMENTS:
            raise ConfigError(f"the GPU kernel's {name} are {kind}; expected {' or '.join(ELEMENTS)}")
    if not 1 <= samples <= MAX_SAMPLES:
        raise ConfigError(f"the GPU kernel was asked for {samples} samples a pixel; expected 1 to {MAX_SAMPLES}")
    arguments = f"{KERNEL}, {ELEMENTS[elements]}, {ELEMENTS[offsets]}, {samples}"
    return f'#include "{_HEADERS[0]}"\nDDSM_KERNEL({arguments})\n'


def compile_ptx(*, elements: str, offsets: str, samples: int, compute_capability: str) -> bytes:
    """PTX of one kernel, which NVIDIA's driver compiles for the GPU that it is to run on.

    Args:
        elements: see `source`.
        offsets: likewise.
        samples: likewise.
        compute_capability: of the GPU, as ``86``; later GPUs run it too. For a GPU newer than NVRTC knows, the newest
            that it does know is taken.

    Raises:
        ConfigError: as `source`.
        BackendError: NVRTC is not installed, knows no GPU that old, or can't compile it.
    """
    text = source(elements=elements, offsets=offsets, samples=samples)
    nvrtc = _nvrtc()
    architecture = _architecture(nvrtc, int(compute_capability))
    options = [b"--std=c++17", f"--gpu-architecture=compute_{architecture}".encode()]
    headers = [(_FOLDER / name).read_bytes() for name in _HEADERS]
    with _program(nvrtc, text.encode(), headers) as program:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BackendError(f"NVRTC can't compile the sampling kernel: {_first_error(nvrtc, program) or error.name}")
        ptx = bytearray(_check(nvrtc, nvrtc.nvrtcGetPTXSize(program)))
        _check(nvrtc, nvrtc.nvrtcGetPTX(program, ptx))
    return bytes(ptx).rstrip(b"\0")


def compiler_version() -> tuple[int, int]:
    """NVRTC's, as ``(13, 0)``. A driver that serves an older version of CUDA does not read its PTX.

    Raises:
        BackendError: it is not installed.
    """
    nvrtc = _nvrtc()
    major, minor = _check(nvrtc, nvrtc.nvrtcVersion())
    return int(major), int(minor)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as exc:  # cuda-pathfinder's error is a RuntimeError
        raise BackendError(
            f"NVRTC, which compiles the sampling kernel, is not usable here ({str(exc).splitlines()[0]}); install it "
            "with: pip install cuda-bindings nvidia-cuda-nvrtc"
        ) from exc
    return nvrtc


@contextlib.contextmanager
def _program(nvrtc: Any, text: bytes, headers: list[bytes]) -> Iterator[Any]:
    names = [name.encode() for name in _HEADERS]
    program = _check(nvrtc, nvrtc.nvrtcCreateProgram(text, f"{KERNEL}.cu".encode(), len(headers), headers, names))
    try:
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _architecture(nvrtc: Any, wanted: int) -> int:
    count = _check(nvrtc, nvrtc.nvrtcGetNumSupportedArchs())
    known = list(_check(nvrtc, nvrtc.nvrtcGetSupportedArchs()))[:count]
    fitting = [architecture for architecture in known if architecture <= wanted]
    if not fitting:
        raise BackendError(f"NVRTC does not compile for compute capability {wanted}, only from {min(known)} on")
    return int(max(fitting))


def _first_error(nvrtc: Any, program: Any) -> str:
    log = bytearray(_check(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    _check(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    lines = bytes(log).rstrip(b"\0").decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), "")


def _check(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BackendError(f"NVRTC failed: {error.name}")
    return values[0] if len(values) == 1 else tuple(values)
