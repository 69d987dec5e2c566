"""The C interface of the CPU kernels, through ctypes: what it refuses, what it keeps, and what it asks of a pool."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable

import numpy as np
import pytest
from sampling_definition import by_loops

from ddsm_deploy import kernels
from ddsm_deploy.errors import InputError

RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64),
                       ctypes.c_void_p)  # fmt: skip
B, K, V, N, Y, X = 2, 9, 20, 9, 11, 18


@pytest.fixture(scope="module", autouse=True)
def _kernels(missing) -> None:
    if not kernels.status().available:
        missing("kernels", kernels.status().reason)


def view(array: np.ndarray) -> kernels.View:
    _, c, y, x = array.shape
    return kernels.View(array.ctypes.data, c * y * x, y * x, 1, kernels.F32)


class Call:
    """Arrays of one call, and the structures that name them."""

    def __init__(self, batch: int = B) -> None:
        numbers = np.random.default_rng(0)
        self.inputs = [numbers.standard_normal((batch, c, Y, X)).astype(np.float32) for c in (K, K, V, 2 * N)]
        self.out = np.empty((batch, V, Y, X), np.float32)
        self.grads = [np.empty_like(array) for array in self.inputs]
        self.sizes = kernels.Sizes(batch, K, V, N, Y, X)
        self.views = [view(array) for array in self.inputs]
        self.grad = view(np.ones_like(self.out))

    def forward(self, pool: kernels.Pool | None = None) -> None:
        kernels.forward(self.sizes, *self.views, view(self.out), pool)

    def backward(self, pool: kernels.Pool | None = None) -> None:
        gradient = np.ones_like(self.out)
        kernels.backward(self.sizes, tuple(self.views), view(gradient), tuple(map(view, self.grads)), pool)


@pytest.mark.parametrize(
    ("field", "number", "says"),
    [
        ("batch", -1, "negative"),
        ("rows", -3, "negative"),
        ("columns", -(2**63), "negative"),
        ("k", 0, "at least 1"),
        ("v", 0, "at least 1"),
        ("n", 0, "at least 1"),
        ("n", 26, "N is over 25"),
        ("k", 65537, "over 65536"),
        ("v", 2**63 - 1, "over 65536"),
        ("rows", 2**31, "too large"),
        ("columns", 2**62, "too large"),
        ("batch", 2**40, "too large"),
    ],
)
def test_sizes_that_are_refused(field: str, number: int, says: str) -> None:
    for call in (Call.forward, Call.backward):
        one = Call()
        setattr(one.sizes, field, number)
        with pytest.raises(InputError, match=says):
            call(one)


@pytest.mark.parametrize(("field", "number"), [("data", None), ("type", 2), ("type", -1)])
@pytest.mark.parametrize("which", range(4))
def test_views_that_are_refused(which: int, field: str, number: int | None) -> None:
    for call in (Call.forward, Call.backward):
        one = Call()
        setattr(one.views[which], field, number)
        with pytest.raises(InputError, match="no address, or a type"):
            call(one)


def test_half_a_position_is_refused() -> None:
    call, rows = Call(), np.zeros((Y, K), np.float32)
    half = kernels.Position(rows.ctypes.data, None)
    with pytest.raises(InputError, match="no address"):
        kernels.forward(call.sizes, *call.views, view(call.out), positions=(None, half))


def test_positions_are_added_to_query_and_key() -> None:
    call, numbers = Call(), np.random.default_rng(3)
    rows = [numbers.standard_normal((Y, K)).astype(np.float32) for _ in range(2)]
    columns = [numbers.standard_normal((X, K)).astype(np.float32) for _ in range(2)]
    given = [kernels.Position(row.ctypes.data, column.ctypes.data) for row, column in zip(rows, columns, strict=True)]
    maps = [row.T[None, :, :, None] + column.T[None, :, None, :] for row, column in zip(rows, columns, strict=True)]
    query, key, value, offset = (array.astype(np.float64) for array in call.inputs)
    for chosen in ((0,), (1,), (0, 1)):
        first, second = (given[i] if i in chosen else None for i in (0, 1))
        kernels.forward(call.sizes, *call.views, view(call.out), positions=(first, second))
        wanted = by_loops(query[:1] + maps[0] * (0 in chosen), key[:1] + maps[1] * (1 in chosen), value[:1], offset[:1])
        assert np.abs(call.out[:1] - wanted).max() <= 1e-5 * np.abs(wanted).max()


class Steps(Call):
    """The same call in two steps, its map in memory that begins and ends in the middle of something."""

    BEFORE = 3

    def __init__(self) -> None:
        super().__init__()
        size = kernels.packed_bytes(self.sizes, kernels.F32)
        self.memory = np.full(self.BEFORE + size + 5, 0x7F, np.uint8)
        self.packed = kernels.Packed(self.memory.ctypes.data + self.BEFORE, size, kernels.F32)

    def pack(self, position: kernels.Position | None = None) -> None:
        kernels.pack(self.sizes, *self.views[1:3], self.packed, position=position)

    def attend(self, position: kernels.Position | None = None) -> None:
        kernels.attend(self.sizes, self.views[0], self.packed, self.views[3], view(self.out), position=position)


def test_two_steps_are_the_whole() -> None:
    whole, steps, numbers = Call(), Steps(), np.random.default_rng(5)
    tables = [numbers.standard_normal((length, K)).astype(np.float32) for length in (Y, X, Y, X)]
    of_query, of_key = (kernels.Position(*(table.ctypes.data for table in tables[i : i + 2])) for i in (0, 2))
    kernels.forward(whole.sizes, *whole.views, view(whole.out), positions=(of_query, of_key))
    steps.pack(of_key)
    steps.attend(of_query)
    # with AVX2 and less, a map that a host keeps holds more padding, and sums may be rounded in another order
    np.testing.assert_allclose(steps.out, whole.out, rtol=0, atol=1e-6 * np.abs(whole.out).max())
    last = steps.BEFORE + steps.packed.bytes
    assert (steps.memory[: steps.BEFORE] == 0x7F).all() and (steps.memory[last:] == 0x7F).all()


@pytest.mark.parametrize(("field", "number"), [("data", None), ("type", 7), ("type", -1), ("bytes", 0), ("bytes", -1)])
def test_memory_that_is_refused(field: str, number: int | None) -> None:
    steps = Steps()
    setattr(steps.packed, field, number)
    for step in (steps.pack, steps.attend):
        with pytest.raises(InputError, match="too small"):
            step()


def test_memory_that_would_lose_digits_or_is_a_byte_short() -> None:
    steps = Steps()
    steps.packed.bytes -= 1
    with pytest.raises(InputError, match="too small"):
        steps.attend()
    steps = Steps()
    steps.packed.type = kernels.BF16
    with pytest.raises(InputError, match="bfloat16"):
        steps.pack()


@pytest.mark.parametrize(("field", "number"), [("batch", -1), ("k", 65537), ("n", 26), ("rows", 2**31)])
def test_sizes_that_have_no_map(field: str, number: int) -> None:
    steps = Steps()
    setattr(steps.sizes, field, number)
    for step in (steps.pack, steps.attend, lambda: kernels.packed_bytes(steps.sizes, kernels.F32)):
        with pytest.raises(InputError):
            step()


@pytest.mark.parametrize("field", ["batch", "rows", "columns"])
def test_nothing_of_nothing(field: str) -> None:
    call = Call()
    setattr(call.sizes, field, 0)
    call.out.fill(7)
    for one in call.views:
        one.data = None
    call.forward()
    call.backward()
    assert (call.out == 7).all()


def test_an_instruction_set_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"'sse9'; expected one of .*plain"):
        kernels.use("sse9")


@pytest.mark.parametrize("order", [sorted, lambda tasks: sorted(tasks, reverse=True),
                                   lambda tasks: random.Random(0).sample(list(tasks), len(tasks))],
                         ids=["first to last", "last to first", "shuffled"])  # fmt: skip
@pytest.mark.parametrize("threads", [2, 5])
def test_a_pool_may_run_tasks_in_any_order(order: Callable[[range], list[int]], threads: int) -> None:
    counts: list[int] = []

    def run(_: int, count: int, task: Callable[[int, int], None], data: int) -> None:
        counts.append(count)
        for index in order(range(count)):
            task(data, index)

    callback = RUN(run)
    pool = kernels.Pool(ctypes.cast(callback, ctypes.c_void_p), None, threads)
    one, other = Call(batch=4 * B), Call(batch=4 * B)  # small calls keep to one thread
    one.forward()
    other.forward(pool)
    assert counts and min(counts) > 1  # it was used
    np.testing.assert_array_equal(one.out, other.out)
    one.backward()
    other.backward(pool)
    for mine, pooled in zip(one.grads, other.grads, strict=True):
        np.testing.assert_allclose(pooled, mine, rtol=0, atol=1e-5 * np.abs(mine).max())


@pytest.mark.parametrize("threads", [1, 0, -4])
def test_a_pool_of_one_thread_is_not_bothered(threads: int) -> None:
    calls: list[int] = []
    callback = RUN(lambda _, count, *rest: calls.append(count))
    call = Call()
    call.forward(kernels.Pool(ctypes.cast(callback, ctypes.c_void_p), None, threads))
    assert not calls
    wanted = by_loops(*(array[:1] for array in call.inputs))
    assert np.abs(call.out[:1] - wanted).max() <= 1e-5 * np.abs(wanted).max()


class Memory(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "top",
        )
    ]


def in_use(missing) -> int:
    """Bytes that this process has from malloc."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        missing("glibc", "its mallinfo2, of version 2.33 and later, counts the memory in use")
    libc.mallinfo2.restype = Memory
    now = libc.mallinfo2()
    return int(now.uordblks + now.hblkhd)


def test_scratch_memory_is_kept_and_does_not_grow(missing) -> None:
    batch = 32  # a megabyte of scratch: Python and its threads take and give back some kilobytes meanwhile
    call = Call(batch)
    library = ctypes.CDLL(str(kernels.library_path()))
    library.ddsm_release_scratch()
    empty = in_use(missing)
    call.backward()
    warm = in_use(missing)
    scratch = batch * (Y + 2) * (X + 2) * (K + V) * 4  # at least, not padded yet
    assert warm - empty >= scratch
    for _ in range(200):
        call.forward()
        call.backward()
    assert in_use(missing) - warm < scratch / 10
    library.ddsm_release_scratch()
    assert in_use(missing) - empty < scratch / 10


def test_a_larger_map_takes_the_place_of_a_smaller_one(missing) -> None:
    """Maps that grow from call to call leave one buffer behind, not one for each size."""
    library = ctypes.CDLL(str(kernels.library_path()))
    library.ddsm_release_scratch()
    batch = 32
    call = Call(batch)
    before = in_use(missing)
    for rows in range(1, Y + 1):
        call.sizes.rows = rows
        call.forward()
    largest = batch * (Y + 2) * (X + 2) * 48 * 4  # bytes: K and V in whole vectors of 16 are 48
    assert in_use(missing) - before < 2 * largest  # all of them would be seven times as much
    library.ddsm_release_scratch()
