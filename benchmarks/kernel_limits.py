"""How near the fused CPU kernel comes to what the cores allow.

    python benchmarks/kernel_limits.py [--threads 1 2] [--layouts channels-last planar] [--types f32 bf16]
                                       [--json FILE]

The kernel (`ddsm_forward`, through `ddsm_deploy.kernels`) runs at the network's own shapes. Beside it, on the same
cores and as many threads, run simple ceilings (`ceilings.cpp`, compiled here for each instruction set with $CXX or
c++):

* ``FMA``: multiply-adds on registers alone (``plain``: multiplications and additions, side by side);
* ``L1`` and ``L2``: multiply-adds of which each reads one factor from memory, 16 or 256 KiB over and over, so from the
  first or the second cache. That is what the kernel's inner loops do: a corner of a sample is one read and about one
  multiply-add; which cache answers is up to the offsets;
* ``copy``: memcpy between two buffers of 64 MiB.

How it is counted. For a pixel and sample, 4K multiply-adds (less one add) blend the key from four corners, K more score
it against the query, and 4V add the value's corners to the sum: N·(9K + 8V) operations a pixel. Coordinates, weights
and softmax, about 60 a sample, are work but not counted. Bytes, of elements of four bytes (bf16: two): ``read`` is what
the inner loops read of key and value, four corners or 4·N·(K + V) elements a pixel; ``moved`` is the least that has to
cross memory, every input once and the output once, 2K + 2V + 2N elements a pixel.

Offsets are the network's own grid, 3×3 dilated by 2 (channel branch: by 1), with uniform noise of up to 1.5 pixels.
Times are medians; instruction sets take turns. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import dataclasses
import functools
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fusion_support import alternate, announce_machine

from ddsm_deploy import kernels

LANES = {"avx512": 16, "avx2": 8, "plain": 4}
FLAGS = {"avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma", "avx2": "-mavx2 -mfma", "plain": ""}

SAMPLES = 9
L1_BYTES, L2_BYTES = 16 * 1024, 256 * 1024
COPY_BYTES = 64 * 1024 * 1024
SECONDS = 0.05  # of one measurement of a ceiling
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call of the operator."""

    name: str
    k: int
    v: int
    rows: int
    columns: int
    dilation: int

    @property
    def pixels(self) -> int:
        return self.rows * self.columns

    @property
    def operations(self) -> int:
        return self.pixels * SAMPLES * (9 * self.k + 8 * self.v)

    def read_bytes(self, size: int) -> int:
        """Of key and value in the inner loops, with elements of `size` bytes."""
        return self.pixels * SAMPLES * 4 * size * (self.k + self.v)

    def moved_bytes(self, size: int) -> int:
        """All inputs and the output once, with elements of `size` bytes."""
        return self.pixels * size * (2 * self.k + 2 * self.v + 2 * SAMPLES)


SHAPES = (
    Shape("spatial, 90x120, V = 32", 32, 32, 90, 120, 2),
    Shape("spatial, 256x512, V = 32", 32, 32, 256, 512, 2),
    Shape("spatial, stride 4 of 360x480 enlarged by 1.5", 32, 64, 135, 180, 2),
    Shape("spatial, stride 4 of 1024x2048", 32, 64, 256, 512, 2),
    Shape("channel branch", 64, 64, 8, 8, 1),
)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the cores reach together: operations and bytes a second, in 10⁹."""

    fma: float
    l1: float
    l2: float
    copy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layouts", nargs="+", choices=["channels-last", "planar"], default=["channels-last"])
    parser.add_argument("--types", nargs="+", choices=["f32", "bf16"], default=["f32"])
    parser.add_argument("--rounds", type=int, default=10, help="turns of the instruction sets, of five calls each")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    announce_machine()
    state = kernels.status()
    if not state.available:
        raise SystemExit(state.reason)
    rows = list(measure(state.instruction_sets, args))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure(sets: tuple[str, ...], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each shape, layout, type, instruction set and number of threads; printed as they come."""
    with tempfile.TemporaryDirectory() as scratch:
        libraries = {name: compile_ceilings(Path(scratch), name) for name in sets}
        for threads in sorted(args.threads):
            ceilings = {name: measure_ceilings(library, threads) for name, library in libraries.items()}
            print(f"\nceilings on {threads} threads:")
            for name, found in ceilings.items():
                print(
                    f"  {name:6} FMA {found.fma:6.1f}, L1 {found.l1:6.1f}, L2 {found.l2:6.1f} GFLOP/s; "
                    f"copy {found.copy:5.1f} GB/s"
                )
            for shape in SHAPES:
                for layout in args.layouts:
                    for kind in args.types:
                        print(f"{shape.name}: K={shape.k} V={shape.v}, {layout}, {kind}, {threads} threads")
                        call = make_call(shape, layout, kind, threads)
                        sides = [functools.partial(_run, name, call) for name in sets]
                        for name, times in zip(sets, alternate(sides, rounds=args.rounds), strict=True):
                            row = describe(shape, kind, statistics.median(times), ceilings[name])
                            print(line(name, row))
                            yield {"instructions": name, "layout": layout, "type": kind, "threads": threads, **row}


def _run(instructions: str, call: Callable[[], object]) -> None:
    kernels.use(instructions)
    call()


def describe(shape: Shape, kind: str, ms: float, ceilings: Ceilings) -> dict[str, Any]:
    """The figures of a row, with their shares of the ceilings (0..1)."""
    per_ms = 1e-6 / ms
    size = 4 if kind == "f32" else 2
    gflops, read, moved = (n * per_ms for n in (shape.operations, shape.read_bytes(size), shape.moved_bytes(size)))
    return {
        "shape": dataclasses.asdict(shape) | {"samples": SAMPLES},
        "ms": ms,
        "gflops": gflops,
        "read_gbs": read,
        "moved_gbs": moved,
        "of_fma": gflops / ceilings.fma,
        "of_l1": gflops / ceilings.l1,
        "of_l2": gflops / ceilings.l2,
        "of_copy": moved / ceilings.copy,
        "ceilings": dataclasses.asdict(ceilings),
    }


def line(instructions: str, row: dict[str, Any]) -> str:
    return (
        f"  {instructions:6} {row['ms']:8.3f} ms  {row['gflops']:6.1f} GFLOP/s ({row['of_fma']:3.0%} of FMA, "
        f"{row['of_l1']:3.0%} of L1, {row['of_l2']:3.0%} of L2)  read {row['read_gbs']:6.1f} GB/s  "
        f"moved {row['moved_gbs']:5.2f} GB/s ({row['of_copy']:3.0%} of copy)"
    )


def make_call(shape: Shape, layout: str, kind: str, threads: int) -> Callable[[], object]:
    """One call of the kernel on random numbers, ready to be repeated."""
    random = np.random.default_rng(0)
    channels = {"query": shape.k, "key": shape.k, "value": shape.v, "offset": 2 * SAMPLES, "out": shape.v}
    arrays = {name: random.standard_normal((shape.pixels, count), np.float32) for name, count in channels.items()}
    arrays["offset"] = random.uniform(-1.5, 1.5, (shape.pixels, 2 * SAMPLES)).astype(np.float32)
    steps = (np.arange(3, dtype=np.float32) - 1) * shape.dilation
    arrays["offset"] += np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1)
    held = {name: _stored(array, layout, kind) for name, array in arrays.items()}
    views = [_view(held[name], count, layout, kind) for name, count in channels.items()]
    sizes = kernels.Sizes(1, shape.k, shape.v, SAMPLES, shape.rows, shape.columns)
    pool = _pool(threads) if threads > 1 else None

    def call(keep: object = held) -> None:  # the views point into `held`
        kernels.forward(sizes, *views, pool)

    return call


def _stored(array: npt.NDArray[np.float32], layout: str, kind: str) -> npt.NDArray[Any]:
    array = array if layout == "channels-last" else np.ascontiguousarray(array.T)
    # the upper half of a float32 is a bfloat16; what rounding would change does not matter to its speed
    return array if kind == "f32" else (array.view(np.uint32) >> 16).astype(np.uint16)


def _view(array: npt.NDArray[Any], channels: int, layout: str, kind: str) -> kernels.View:
    pixels = array.size // channels
    strides = (1, channels) if layout == "channels-last" else (pixels, 1)
    return kernels.View(array.ctypes.data, array.size, *strides, kernels.F32 if kind == "f32" else kernels.BF16)


def _pool(threads: int) -> kernels.Pool:
    try:
        library = ctypes.CDLL("libgomp.so.1")
    except OSError as exc:
        raise SystemExit(f"threads are GNU OpenMP's here, which is missing ({exc}); measure with --threads 1") from exc
    library.omp_set_num_threads(threads)
    return kernels.gomp_pool(library, threads)


def compile_ceilings(folder: Path, instructions: str) -> ctypes.CDLL:
    """`ceilings.cpp` for one instruction set."""
    target = folder / f"ceilings_{instructions}.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-Wno-psabi", f"-DLANES={LANES[instructions]}"]
    source = Path(__file__).with_name("ceilings.cpp")
    subprocess.run([*compiler, *flags, *FLAGS[instructions].split(), str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("lanes", "sums_in_registers"):
        getattr(library, name).restype = ctypes.c_int64
    library.fma_registers.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_float]
    library.fma_reads.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    library.copies.argtypes = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return library


def measure_ceilings(library: ctypes.CDLL, threads: int) -> Ceilings:
    """The best of a few tries of each loop, on so many threads at once, each with memory of its own."""
    data = [_aligned(L2_BYTES // 4) for _ in range(threads)]
    blocks = [(np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)) for _ in range(threads)]

    def registers(turns: int, _: int) -> None:
        library.fma_registers(turns, 1.0, 1.0)

    def reads(size: int) -> Callable[[int, int], None]:
        return lambda turns, thread: library.fma_reads(turns, data[thread].ctypes.data, size // 4)

    def copy(turns: int, thread: int) -> None:
        to, source = blocks[thread]
        library.copies(turns, to.ctypes.data, source.ctypes.data, COPY_BYTES)

    return Ceilings(
        fma=_rate(registers, 2 * library.sums_in_registers() * library.lanes(), threads),
        l1=_rate(reads(L1_BYTES), 2 * L1_BYTES // 4, threads),
        l2=_rate(reads(L2_BYTES), 2 * L2_BYTES // 4, threads),
        copy=_rate(copy, 2 * COPY_BYTES, threads),
    )


def _aligned(count: int) -> npt.NDArray[np.float32]:
    """Ones from a whole cache line on: vectors that lie across two cost twice."""
    room = np.ones(count + 16, np.float32)
    return room[-room.ctypes.data // 4 % 16 :][:count]


def _rate(loop: Callable[[int, int], None], work: int, threads: int) -> float:
    """Units of `work` a second, in 10⁹, of a loop that does `work` a turn and thread."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def seconds(turns: int) -> float:
            started = time.perf_counter()
            list(pool.map(loop, [turns] * threads, range(threads)))
            return time.perf_counter() - started

        turns = 1
        while seconds(turns) < SECONDS:
            turns *= 2
        return 1e-9 * work * turns * threads / min(seconds(turns) for _ in range(REPEATS))


if __name__ == "__main__":
    main()
