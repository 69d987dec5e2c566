"""The CPU kernels, called through a C interface (``src/ddsm.h``): `dynamic_sample_attention`, and logits to classes.

One library serves torch, ONNX Runtime and OpenVINO: it is given addresses with strides, and the threads of whoever
calls. It is built when the package is installed; where that was not possible, `status` says why, and dynamic sampling
runs as standard operators.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from pathlib import Path

from ddsm_deploy.errors import BackendError, InputError

__all__ = [
    "ABI",
    "BF16",
    "F32",
    "MAX_SAMPLES",
    "KernelStatus",
    "MapSizes",
    "Packed",
    "Pool",
    "Position",
    "Sizes",
    "View",
    "attend",
    "backward",
    "class_map",
    "forward",
    "gomp_pool",
    "library_path",
    "pack",
    "packed_bytes",
    "pool_path",
    "status",
    "use",
]

ABI = 3
"""Of ``src/ddsm.h``, which this file describes once more for ctypes."""

MAX_SAMPLES = 25
"""N, the most positions a pixel may sample."""

F32, BF16 = 0, 1
"""Element types of a `View`."""

_FOLDER = Path(__file__).parent
_OUT_OF_MEMORY = -4


class Sizes(ctypes.Structure):
    """B, K, V, N, Y, X."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "k", "v", "n", "rows", "columns")]


class MapSizes(ctypes.Structure):
    """B, C, Y, X of logits, and Y', X' of the mask."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "classes", "rows", "columns", "out_rows", "out_columns")]


class View(ctypes.Structure):
    """A tensor B×C×Y×X in memory: address, strides in elements (of an image, a channel, a pixel), `F32` or `BF16`."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channel", ctypes.c_int64),
        ("pixel", ctypes.c_int64),
        ("type", ctypes.c_int32),
    ]


class Packed(ctypes.Structure):
    """Memory for key and value in one map: address, bytes (see `packed_bytes`), `F32` or `BF16`."""

    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_int64), ("type", ctypes.c_int32)]


class Position(ctypes.Structure):
    """A position embedding by axis: addresses of rows Y×K and columns X×K, float32; a pixel's is the sum of both."""

    _fields_ = [("rows", ctypes.c_void_p), ("columns", ctypes.c_void_p)]


class Pool(ctypes.Structure):
    """Threads lent to a call: a C function that runs tasks, its argument, and how many threads it may use."""

    _fields_ = [("run", ctypes.c_void_p), ("self", ctypes.c_void_p), ("threads", ctypes.c_int32)]


@dataclasses.dataclass(frozen=True)
class KernelStatus:
    """Whether the fused kernels can be used here.

    Attributes:
        available: whether they can.
        path: the library; None where there is none.
        instruction_sets: what it has and this processor runs, best first: ``avx512``, ``avx2``, ``plain``.
        reason: why not, and what to do; empty where available.
    """

    available: bool
    path: Path | None = None
    instruction_sets: tuple[str, ...] = ()
    reason: str = ""


def status() -> KernelStatus:
    """The state of the kernels; loads them."""
    try:
        library = _library()
    except BackendError as exc:
        return KernelStatus(False, reason=str(exc))
    return KernelStatus(True, _FOLDER / "libddsm.so", tuple(library.ddsm_instruction_sets().decode().split()))


def problem(float_type: str = "fp32") -> str:
    """Why the kernels can't compute on tensors of a type here, with the cure; empty where they can.

    Args:
        float_type: ``fp32``, ``bf16`` or ``fp16``.
    """
    return "the fused kernels take no float16" if float_type == "fp16" else status().reason


def library_path() -> Path:
    """The library, for runtimes that load it themselves.

    Raises:
        BackendError: it was not built, or does not load.
    """
    _library()
    return _FOLDER / "libddsm.so"


def pool_path() -> Path:
    """The library that holds a pool over OpenVINO's threads, to be loaded beside its TBB.

    Raises:
        BackendError: it was not built.
    """
    path = _FOLDER / "libddsm_tbb.so"
    if not path.is_file():
        raise BackendError(f"{path.name} was not built ({_why_not_built(path.name)})")
    return path


def heap_path() -> Path | None:
    """The library that, preloaded, gives a process memory at the same addresses in every run; None where it was not
    built.

    What it is for: `ddsm_deploy.export.tensorrt.builder`.
    """
    path = _FOLDER / "libddsm_heap.so"
    return path if path.is_file() else None


def forward(
    sizes: Sizes,
    query: View,
    key: View,
    value: View,
    offset: View,
    out: View,
    pool: Pool | None = None,
    *,
    positions: tuple[Position | None, Position | None] = (None, None),
) -> None:
    """`dynamic_sample_attention`, written to `out`. Releases the GIL.

    Without a pool it runs on the calling thread alone. `positions` are added to query and key first.

    Raises:
        BackendError: there are no kernels, or no memory.
        InputError: sizes or types that they don't take.
    """
    _check(_library().ddsm_forward_positioned(sizes, query, key, value, offset, out, *positions, pool))


def packed_bytes(sizes: Sizes, kind: int) -> int:
    """How much memory `pack` fills for these sizes; `kind` is `F32` or `BF16`, the latter only where both maps are.

    Raises:
        BackendError: there are no kernels.
        InputError: sizes or a type that they don't take.
    """
    found: int = _library().ddsm_packed_bytes(sizes, kind)
    _check(min(found, 0))
    return found


def pack(
    sizes: Sizes, key: View, value: View, packed: Packed, pool: Pool | None = None, *, position: Position | None = None
) -> None:
    """The first half of `forward`, for hosts that have memory for what it makes; `position` is added to the key.

    Raises:
        BackendError: there are no kernels, or no memory.
        InputError: sizes, types or memory that they don't take.
    """
    _check(_library().ddsm_pack(sizes, key, value, packed, position, pool))


def attend(
    sizes: Sizes,
    query: View,
    packed: Packed,
    offset: View,
    out: View,
    pool: Pool | None = None,
    *,
    position: Position | None = None,
) -> None:
    """The second half of `forward`, on what `pack` has made; `position` is added to the query.

    Raises:
        BackendError: there are no kernels, or no memory.
        InputError: sizes, types or memory that they don't take.
    """
    _check(_library().ddsm_attend(sizes, query, packed, offset, out, position, pool))


def backward(
    sizes: Sizes,
    inputs: tuple[View, View, View, View],
    grad: View,
    grad_inputs: tuple[View, View, View, View],
    pool: Pool | None = None,
) -> None:
    """Gradients of query, key, value and offset, from that of the output; each is written whole. Releases the GIL.

    Raises:
        BackendError: there are no kernels, or no memory.
        InputError: sizes or types that they don't take.
    """
    _check(_library().ddsm_backward(sizes, *inputs, grad, *grad_inputs, pool))


def class_map(sizes: MapSizes, logits: View, mask: int, pool: Pool | None = None) -> None:
    """The class of the greatest logit at each pixel of a larger (or smaller) map, without logits of that size.

    The logits are resized bilinearly, pixel centres aligned; of equal ones the first class counts. They are taken to be
    finite. `mask` is the address of B·Y'·X' bytes. Releases the GIL.

    Raises:
        BackendError: there are no kernels, or no memory.
        InputError: sizes or types that they don't take.
    """
    _check(_library().ddsm_class_map(sizes, logits, mask, pool), "class map")


def use(instruction_set: str) -> None:
    """Takes one of `KernelStatus.instruction_sets` from now on, in the whole process: for tests and benchmarks.

    Raises:
        InputError: there is none of that name.
    """
    if not _library().ddsm_use(instruction_set.encode()):
        raise InputError(
            f"instruction set is {instruction_set!r}; expected one of {', '.join(status().instruction_sets)}"
        )


def gomp_pool(library: ctypes.CDLL, threads: int) -> Pool:
    """The threads of an OpenMP runtime (GNU's interface) that is loaded already.

    Args:
        library: one through which its ``GOMP_parallel`` is found.
        threads: how many that runtime is set to use.
    """
    address = ctypes.cast(library.GOMP_parallel, ctypes.c_void_p)
    pool: Pool = _library().ddsm_gomp_pool(address, threads)
    return pool


@functools.cache
def _library() -> ctypes.CDLL:
    path = _FOLDER / "libddsm.so"
    if not path.is_file():
        raise BackendError(f"the fused kernels were not built ({_why_not_built('libddsm.so')})")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as exc:
        raise BackendError(f"the fused kernels can't be loaded ({exc}); reinstall ddsm-deploy") from exc
    if library.ddsm_abi() != ABI:
        raise BackendError(f"{path} is of another version (ABI {library.ddsm_abi()}, not {ABI}); reinstall ddsm-deploy")
    _declare(library)
    return library


def _why_not_built(name: str) -> str:
    note = _FOLDER / "not_built.txt"
    lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
    return next(
        (line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")),
        "reinstall ddsm-deploy where there is a C++ compiler",
    )


def _declare(library: ctypes.CDLL) -> None:
    view = ctypes.POINTER(View)
    position, pool = ctypes.POINTER(Position), ctypes.POINTER(Pool)
    library.ddsm_forward_positioned.argtypes = [ctypes.POINTER(Sizes), *[view] * 5, position, position, pool]
    packed = ctypes.POINTER(Packed)
    library.ddsm_packed_bytes.argtypes = [ctypes.POINTER(Sizes), ctypes.c_int32]
    library.ddsm_packed_bytes.restype = ctypes.c_int64
    library.ddsm_pack.argtypes = [ctypes.POINTER(Sizes), view, view, packed, position, pool]
    library.ddsm_attend.argtypes = [ctypes.POINTER(Sizes), view, packed, view, view, position, pool]
    library.ddsm_backward.argtypes = [ctypes.POINTER(Sizes), *[view] * 9, pool]
    library.ddsm_class_map.argtypes = [ctypes.POINTER(MapSizes), view, ctypes.c_void_p, pool]
    library.ddsm_message.restype = library.ddsm_instruction_sets.restype = ctypes.c_char_p
    library.ddsm_use.argtypes = [ctypes.c_char_p]
    library.ddsm_gomp_pool.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    library.ddsm_gomp_pool.restype = Pool


def _check(code: int, what: str = "dynamic sampling") -> None:
    if code:
        message = _library().ddsm_message(code).decode()
        raise (BackendError if code == _OUT_OF_MEMORY else InputError)(f"{what}: {message}")
