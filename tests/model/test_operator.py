"""The operator against a definition written with loops, its gradients, and its registration."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddsm_deploy.errors import InputError
from ddsm_deploy.model.operator import dynamic_sample_attention


def by_loops(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """The definition, pixel by pixel, in plain Python numbers: shares no code with the product."""
    b, k, rows, columns = query.shape
    v, n = value.shape[1], offset.shape[1] // 2
    result = torch.zeros_like(value)

    def read(plane: Tensor, y: float, x: float) -> float:
        total = 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < rows and 0 <= column < columns:
                    total += (1 - abs(y - row)) * (1 - abs(x - column)) * float(plane[row, column])
        return total

    for i in range(b):
        for y in range(rows):
            for x in range(columns):
                places = [(y + float(offset[i, 2 * s, y, x]), x + float(offset[i, 2 * s + 1, y, x])) for s in range(n)]
                scores = [
                    sum(float(query[i, c, y, x]) * read(key[i, c], *p) for c in range(k)) / math.sqrt(k) for p in places
                ]
                top = max(scores)
                weights = [math.exp(s - top) for s in scores]
                for c in range(v):
                    total = sum(w * read(value[i, c], *p) for w, p in zip(weights, places, strict=True))
                    result[i, c, y, x] = total / sum(weights)
    return result


def tensors(b: int, k: int, v: int, n: int, y: int, x: int, spread: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * 100 + y)
    shapes = [(b, k, y, x), (b, k, y, x), (b, v, y, x), (b, 2 * n, y, x)]
    query, key, value, offset = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [query, key, value, offset * spread]


@pytest.mark.parametrize(
    ("k", "v", "n", "y", "x", "spread"),
    [(3, 2, 9, 4, 5, 2.0), (1, 1, 1, 1, 1, 0.7), (2, 3, 4, 1, 6, 1.0), (2, 2, 25, 3, 3, 40.0), (4, 1, 9, 5, 2, 0.0)],
)
def test_equals_the_definition(k: int, v: int, n: int, y: int, x: int, spread: float) -> None:
    inputs = tensors(2, k, v, n, y, x, spread)
    torch.testing.assert_close(dynamic_sample_attention(*inputs), by_loops(*inputs), rtol=1e-9, atol=1e-9)


def test_gradients_are_right_in_float64() -> None:
    inputs = [t.requires_grad_() for t in tensors(1, 3, 2, 4, 4, 5)]
    assert torch.autograd.gradcheck(dynamic_sample_attention, inputs)


def test_half_precision_inputs_keep_coordinates_in_float32() -> None:
    query, key, value, offset = (t.float() for t in tensors(1, 4, 4, 9, 8, 300))
    exact = dynamic_sample_attention(query, key, value, offset)
    half = dynamic_sample_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), offset)
    assert half.dtype == torch.bfloat16
    # bfloat16 has 8 bits of mantissa: coordinates near 300 in it would be off by a whole pixel, these values are not
    assert (half.float() - exact).abs().max() < 0.1


def test_export_sees_one_operator() -> None:
    class Module(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
            return dynamic_sample_attention(query, key, value, offset)

    inputs = tuple(t.float() for t in tensors(1, 2, 2, 4, 3, 4))
    program = torch.export.export(Module(), inputs)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls == ["ddsm.dynamic_sample_attention.default"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ((1, (1, 3, 4, 4)), "key"),
        ((2, (1, 2, 4, 6)), "value"),
        ((3, (1, 3, 4, 5)), "offset"),
        ((3, (1, 0, 4, 5)), "offset"),
    ],
)
def test_shapes_that_do_not_belong_together(change: tuple[int, tuple[int, ...]], says: str) -> None:
    inputs = tensors(1, 2, 2, 4, 4, 5)
    inputs[change[0]] = torch.zeros(change[1], dtype=torch.float64)
    with pytest.raises(InputError, match=says):
        dynamic_sample_attention(*inputs)
