"""Calls of the fused kernels for property-based tests: sizes, layouts in memory, and offsets of every awkward kind."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("planar", "channels last", "slice", "slice of channels last", "one image", "one channel", "turned", "sparse")
KINDS = ("near", "wide", "whole", "almost whole", "edge", "far", "special")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes, how each of the four inputs lies in memory, what its offsets are like, torch's threads."""

    b: int = 1
    k: int = 5
    v: int = 3
    n: int = 9
    y: int = 6
    x: int = 7
    layouts: tuple[str, ...] = ("planar",) * 4
    kinds: tuple[str, ...] = ("near",)
    threads: int = 1
    seed: int = 0

    def tensors(self, *, bound: float | None = None) -> list[Tensor]:
        """Query, key, value, offset in float32.

        Args:
            bound: scales query and key so that no score, and no sum of one's absolute terms, is above it.
        """
        generator = torch.Generator().manual_seed(self.seed)
        channels = (self.k, self.k, self.v)
        query, key, value = (torch.randn(self.b, c, self.y, self.x, generator=generator) for c in channels)
        if bound is not None and query.numel():
            factor = bound * self.k**0.5 / (query.norm(dim=1).max() * key.norm(dim=1).max())
            query, key = query * factor.sqrt(), key * factor.sqrt()
        inputs = [query, key, value, torch.from_numpy(offsets(self))]
        return [laid_out(tensor, layout) for tensor, layout in zip(inputs, self.layouts, strict=True)]


def offsets(case: Case) -> np.ndarray:
    """Float32 B×2N×Y×X; every number is of one of the case's kinds."""
    random = np.random.default_rng(case.seed)
    shape = (case.b, 2 * case.n, case.y, case.x)
    rows, columns = np.mgrid[: case.y, : case.x]
    at = np.broadcast_to(np.stack([rows, columns] * case.n), shape)
    size = np.broadcast_to(np.array([case.y, case.x] * case.n)[:, None, None], shape)
    near = random.normal(size=shape)
    made = {
        "near": near * 2,
        "wide": near * size,
        "whole": np.round(near * 2),
        "almost whole": np.round(near) + random.choice([1e-7, -1e-7, 1e-20, -1e-20, 1e-42, -1e-42], shape),
        "edge": random.choice([-2, -1, 0, 1], shape) + size * random.integers(0, 2, shape) - at,  # also past it
        "far": random.choice([1e9, -1e9, 1e30, -1e30, 2.0**31, -(2.0**31), 3.4e38, 1e6], shape),
        "special": random.choice([np.inf, -np.inf, np.nan], shape),
    }
    kind = random.integers(0, len(case.kinds), shape)
    result = np.zeros(shape, np.float32)
    for index, name in enumerate(case.kinds):
        result = np.where(kind == index, made[name].astype(np.float32), result)
    return result


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout; "one image" and "one channel" repeat one, without a copy of it."""
    b, c, y, x = tensor.shape
    match layout:
        case "planar":
            return tensor.contiguous()
        case "channels last":
            return tensor.contiguous(memory_format=torch.channels_last)
        case "slice":
            return torch.cat([tensor, torch.full_like(tensor, torch.nan), tensor], 1)[:, 2 * c :]
        case "slice of channels last":
            return laid_out(laid_out(tensor, "slice")._base, "channels last")[:, :c]
        case "one image":
            return tensor[:1].expand(b, -1, -1, -1)
        case "one channel":
            return tensor[:, :1].expand(-1, c, -1, -1)
        case "turned":  # columns of a map follow one another: the kernels take a copy of it
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        case "sparse":  # every second pixel of a larger map
            large = torch.full((b, c, 2 * y, 2 * x), torch.nan, dtype=tensor.dtype)
            large[:, :, ::2, ::2] = tensor
            return large[:, :, ::2, ::2]
    raise ValueError(layout)


@st.composite
def cases(draw: st.DrawFn, *, most: int = 70) -> Case:
    """Calls of all sizes that the operator takes, within what a test has time for.

    Args:
        most: channels of key and value.
    """
    b, n = draw(st.integers(0, 3)), draw(st.integers(1, 25))
    y, x = draw(st.one_of(*(st.tuples(st.integers(1, h), st.integers(1, w)) for h, w in ((5, 6), (1, 40), (40, 1)))))
    k, v = draw(st.integers(1, most)), draw(st.integers(1, most))
    if draw(st.integers(0, 3)) == 0:  # a large map, of few channels
        b, y, x, k, v = 1, draw(st.integers(8, 20)), draw(st.integers(8, 20)), 1 + k % 17, 1 + v % 17
    return Case(
        b=b,
        k=k,
        v=v,
        n=n,
        y=y,
        x=x,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        kinds=tuple(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4, unique=True))),
        threads=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 2**16)),
    )
