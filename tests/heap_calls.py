"""Calls a process's heap in every way from several threads, with its blocks checked; prints addresses, one a line.

Run by `tests/kernels/test_heap.py` with the package's heap preloaded, and without it.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading

C = ctypes.CDLL(None)
for _name, _result, _arguments in (
    ("malloc", ctypes.c_void_p, [ctypes.c_size_t]),
    ("calloc", ctypes.c_void_p, [ctypes.c_size_t] * 2),
    ("realloc", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    ("reallocarray", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]),
    ("aligned_alloc", ctypes.c_void_p, [ctypes.c_size_t] * 2),
    ("posix_memalign", ctypes.c_int, [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]),
    ("malloc_usable_size", ctypes.c_size_t, [ctypes.c_void_p]),
    ("free", None, [ctypes.c_void_p]),
):
    _function = getattr(C, _name)
    _function.restype, _function.argtypes = _result, _arguments


class Blocks:
    """Blocks of one thread: each holds one byte's value throughout."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.held: dict[int, tuple[int, int]] = {}  # address -> size, value
        self.addresses: list[int] = []

    def size(self) -> int:
        """Mostly small, some of megabytes, some at the edge of a class, some of nothing."""
        bits = self.random.choice([3, 5, 7, 9, 10, 12, 15, 18, 19, 22])
        return self.random.choice([self.random.randrange(1 << bits), 1 << bits, (1 << bits) + 1, 0])

    def keep(self, address: int | None, size: int, alignment: int = 16) -> None:
        assert address and address % alignment == 0, (address, size, alignment)
        assert C.malloc_usable_size(address) >= size
        assert address not in self.held
        value = self.random.randrange(256)
        ctypes.memset(address, value, size)
        self.held[address] = (size, value)
        self.addresses.append(address)

    def drop(self) -> tuple[int, int, int]:
        address = self.random.choice(list(self.held))
        size, value = self.held.pop(address)
        assert ctypes.string_at(address, size) == bytes([value]) * size, "another block was written over this one"
        return address, size, value

    def step(self) -> None:
        size, kind = self.size(), self.random.randrange(7)
        if kind == 0:
            self.keep(C.malloc(size), size)
        elif kind == 1:
            address = C.calloc(size, 3)
            assert ctypes.string_at(address, 3 * size) == bytes(3 * size), "calloc's memory is not zero"
            self.keep(address, 3 * size)
        elif kind == 2:
            alignment = 1 << self.random.randrange(4, 17)
            self.keep(C.aligned_alloc(alignment, size), size, alignment)
        elif kind == 3:
            place, alignment = ctypes.c_void_p(), 1 << self.random.randrange(4, 17)
            assert C.posix_memalign(ctypes.byref(place), alignment, size) == 0
            self.keep(place.value, size, alignment)
        elif kind == 4 and self.held:
            address, before, value = self.drop()
            moved = C.realloc(address, size + 1)
            kept = min(before, size + 1)
            assert ctypes.string_at(moved, kept) == bytes([value]) * kept, "realloc lost what was there"
            self.keep(moved, size + 1)
        elif self.held:
            C.free(self.drop()[0])


def main() -> None:
    threads = [Blocks(seed) for seed in range(int(sys.argv[1]))]
    restart = getattr(C, "ddsm_heap_restart", None)
    if restart is not None:
        assert restart() == 0

    def run(blocks: Blocks) -> None:
        for _ in range(3000):
            blocks.step()

    workers = [threading.Thread(target=run, args=(blocks,)) for blocks in threads[1:]]
    for worker in workers:
        worker.start()
    run(threads[0])
    for worker in workers:
        worker.join()
    own = threads[0].addresses[:]
    for blocks in threads:  # all by the main thread
        while blocks.held:
            C.free(blocks.drop()[0])
    too_much = ctypes.c_size_t(-1).value
    assert C.malloc(too_much) is C.calloc(too_much, 2) is C.reallocarray(None, too_much, 2) is None
    assert C.posix_memalign(ctypes.byref(ctypes.c_void_p()), 3, 8) != 0
    C.free(None)
    print("\n".join(map(str, own)))


if __name__ == "__main__":
    main()
