"""Calls of the GPU kernel, for the tests of its body on the CPU and of itself on a GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
from sampling_definition import by_loops

FAR = (1e9, -1e9, 3e38, -3e38, np.inf, -np.inf, np.nan)
"""Offsets that lie outside every map."""

Array = np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call, and how many channels of V a block takes."""

    b: int = 1
    k: int = 3
    v: int = 2
    n: int = 9
    y: int = 4
    x: int = 5
    chunk: int | None = None

    def tensors(self, *, spread: float = 2.0, kind: type = np.float32, offset_kind: type = np.float32) -> list[Array]:
        """Random query, key, value and offset; the offsets are `spread` pixels wide."""
        random = np.random.default_rng(1000 * self.n + 10 * self.y + self.x)
        channels = (self.k, self.k, self.v, 2 * self.n)
        query, key, value, offset = (random.standard_normal((self.b, c, self.y, self.x)) for c in channels)
        return [*(tensor.astype(kind) for tensor in (query, key, value)), (offset * spread).astype(offset_kind)]


CASES = (
    Case(b=2, k=1, v=1, y=1, x=1),
    Case(y=1, x=7),
    Case(y=7, x=1),
    Case(y=2, x=2),
    Case(b=3, y=3, x=11),  # 33 pixels: the last block has one
    Case(y=4, x=8),  # 32: exactly one block
    Case(k=9, v=9, y=3, x=3),  # a channel more than there are warps
    Case(k=17, v=30, chunk=16, y=8, x=8),  # two blocks, two chunks, the second not full
    Case(k=4, v=20, chunk=8, n=4, y=5, x=13),
    Case(v=3, chunk=1, n=1, y=2, x=3),
    Case(k=4, v=3, n=4, chunk=64),  # a chunk larger than V
)


def assert_equal(result: Array, tensors: list[Array], tolerance: float = 1e-5) -> None:
    """Whether a result is the definition's, to so much of its largest number."""
    expected = by_loops(*tensors)
    error = np.abs(result.astype(np.float64) - expected).max()
    assert error <= tolerance * max(np.abs(expected).max(), 1e-3), f"off by {error}"
