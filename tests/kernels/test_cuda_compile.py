"""That NVIDIA's compilers take the GPU kernel for every GPU; none runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ddsm_deploy.errors import BackendError, ConfigError
from ddsm_deploy.kernels import cuda

SOURCES = Path(cuda.__file__).parent / "src"
CAPABILITIES = ("75", "80", "86", "87", "89", "90", "100", "120")
MOST_SHARED = 48 * 1024
"""Bytes of shared memory that a block may have without asking, in the CUDA programming guide's table of limits."""


@pytest.fixture
def nvrtc(need, missing) -> None:
    need("cuda")
    try:
        cuda.compiler_version()
    except BackendError as exc:
        missing("nvrtc", str(exc))


def test_nvcc_takes_it_for_every_gpu(tmp_path: Path, missing) -> None:
    """Without a warning, without registers spilled to memory at 4 and 9 samples, within the shared memory allowed."""
    if shutil.which("nvcc") is None:
        missing("nvcc", "no such compiler is on the path")
    cases = [("fp32", "fp32", 9), ("fp16", "fp32", 4), ("fp16", "fp16", 25)]
    kernels = [
        f"DDSM_KERNEL(kernel_{samples}, {cuda.ELEMENTS[elements]}, {cuda.ELEMENTS[offsets]}, {samples})"
        for elements, offsets, samples in cases
    ]
    program = tmp_path / "all.cu"
    program.write_text("\n".join(['#include "attention.cuh"', *kernels, ""]), encoding="utf-8")
    gpus = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CAPABILITIES]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2", *gpus]
    command += [f"-I{SOURCES}", "-fatbin", str(program), "-o", str(tmp_path / "all.fatbin")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "Unsupported gpu architecture" in done.stderr:
        missing("nvcc", done.stderr.splitlines()[0])
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes spill stores.*?(\d+) bytes smem", done.stderr, re.S
    )
    assert {(name, gpu) for name, gpu, _, _ in found} == {
        (f"kernel_{c[2]}", gpu) for c in cases for gpu in CAPABILITIES
    }
    assert not [row for row in found if row[0] != "kernel_25" and int(row[2])]
    assert all(int(shared) <= MOST_SHARED for *_, shared in found)


@pytest.mark.parametrize("elements", cuda.ELEMENTS)
@pytest.mark.parametrize("offsets", cuda.ELEMENTS)
def test_ptx_is_made_without_a_gpu(nvrtc: None, elements: str, offsets: str) -> None:
    ptx = cuda.compile_ptx(elements=elements, offsets=offsets, samples=9, compute_capability="86").decode()
    assert re.search(r"^\.target sm_86$", ptx, re.M)
    head = ptx[ptx.index(f".visible .entry {cuda.KERNEL}(") :]
    types = re.findall(r"\.param \.(\w+)", head[: head.index(")")])
    assert types == ["u64"] * 4 + ["u32"] * 5 + ["u64"]  # inputs, Y, X, K, V and channels a block, the result
    assert f".maxntid {cuda.THREADS}" in head
    width = {"fp32": "b32|f32|u32", "fp16": "b16|u16"}[elements]
    assert re.search(rf"st\.global\.(?:{width})", head)


@pytest.mark.parametrize(("capability", "target"), [("75", "75"), ("87", "87"), ("90", "90"), ("120", "120")])
def test_ptx_is_for_the_gpu_asked_for(nvrtc: None, capability: str, target: str) -> None:
    ptx = cuda.compile_ptx(elements="fp32", offsets="fp32", samples=1, compute_capability=capability)
    assert f".target sm_{target}".encode() in ptx


def test_a_gpu_from_the_future_gets_the_newest_ptx(nvrtc: None) -> None:
    ptx = cuda.compile_ptx(elements="fp32", offsets="fp32", samples=1, compute_capability="999").decode()
    (target,) = re.findall(r"^\.target sm_(\d+)", ptx, re.M)
    assert 120 <= int(target) < 999


def test_what_it_can_not_compile(nvrtc: None) -> None:
    with pytest.raises(BackendError, match=r"does not compile for compute capability 30, only from \d+ on"):
        cuda.compile_ptx(elements="fp32", offsets="fp32", samples=1, compute_capability="30")
    with pytest.raises(ConfigError, match="elements are int8; expected fp32 or fp16"):
        cuda.source(elements="int8", offsets="fp32", samples=9)
    with pytest.raises(ConfigError, match="offsets are bf16; expected fp32 or fp16"):
        cuda.source(elements="fp32", offsets="bf16", samples=9)
    for samples in (0, 26):
        with pytest.raises(ConfigError, match=f"{samples} samples a pixel; expected 1 to 25"):
            cuda.source(elements="fp32", offsets="fp32", samples=samples)


def test_launches_speak_of_the_source_s_blocks() -> None:
    """The numbers that a launch is computed with stand in Python as well."""
    text = (SOURCES / "attention.cuh").read_text(encoding="utf-8")
    lanes, warps = (int(re.findall(rf"constexpr int {name} = (\d+);", text)[0]) for name in ("kLanes", "kWarps"))
    assert (lanes, lanes * warps) == (cuda.LANES, cuda.THREADS)
