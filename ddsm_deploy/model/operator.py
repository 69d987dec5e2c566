"""The one operator behind both branches of the Dynamic Dual Sampling Module.

Legend of dimension letters, used in the whole subpackage:

    B  images in a batch        C  channels of the pyramid      N  sampled positions a pixel
    K  channels of query, key   V  channels of value            Y, X  rows and columns of the map
    H, W  of the low layer      h, w  of the next higher layer  a  side of a pooled map

It is registered with torch as ``ddsm::dynamic_sample_attention``, with shapes for tracing and with gradients, so that
`torch.export` sees a single node, which `ddsm_deploy.export` then writes in the form that a runtime is good at. On CPUs
float32 and bfloat16 go to the fused kernels where those are built; all else is computed as `reference` says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsm_deploy.errors import InputError
from ddsm_deploy.model import fused

MAX_SAMPLES = 25
"""N, the most positions a pixel may sample; kernels keep them all in registers or close by."""

FAR = 1e6
"""Pixels; an offset this long or longer, an infinite or an undefined one counts as this long: it leads off any map."""


def dynamic_sample_attention(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """Every pixel attends to N positions of its own choice.

    For pixel p and sample n, ``key`` and ``value`` are read bilinearly at ``p + offset_n(p)``, where anything outside
    the map counts as zero; the affinities are the softmax over n of ``query(p) · key_n(p) / sqrt(K)``, and the result
    is the affinity-weighted sum of the sampled values. Coordinates and softmax are computed in float32 at least,
    whatever the precision of the inputs.

    A sample between the outermost pixels and the zeros beyond them is a blend of both. One that lies more than a pixel
    outside reads zeros alone, moves with none of its offsets (their gradients are zero), and still takes part in the
    softmax, with a score of 0. Huge, infinite and NaN offsets lie outside. A map of one pixel is a map; one of none, or
    a batch of none, gives an empty result. NaN or infinity in query, key or value spoils the pixels that read it.

    Args:
        query: B×K×Y×X.
        key: B×K×Y×X.
        value: B×V×Y×X.
        offset: B×2N×Y×X with N from 1 to 25, in pixels of the map: channel 2n is the vertical offset of sample n,
            2n+1 the horizontal one, downwards and rightwards positive.

    Returns:
        B×V×Y×X, in `value`'s type.

    Raises:
        InputError: shapes that do not belong together.

    Source: Shi et al., "Dynamic Dual Sampling Module for Fine-Grained Semantic Segmentation", ICIP 2021, figure 2; the
    scaling by sqrt(K) is this project's choice.
    """
    _check(query, key, value, offset)
    return torch.ops.ddsm.dynamic_sample_attention(query, key, value, offset)


def reference(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """The operator in plain PyTorch (GridSample form): in float64, what all other forms are tested against.

    Shapes as in `dynamic_sample_attention`. Materialises N·(K+V)·Y·X numbers an image.
    """
    if not value.numel():
        return torch.zeros_like(value)
    _, _, keys, values = _sample(key, value, offset)
    scores = (query.to(keys).unsqueeze(2) * keys).sum(1) * query.shape[1] ** -0.5
    affinity = scores.softmax(1)
    return (values * affinity.unsqueeze(1)).sum(2).to(value.dtype)


def _sample(key: Tensor, value: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """GridSample's inputs (cells B×(K+V)×Y×X, grid), and what it reads: keys B×K×N×Y×X, values B×V×N×Y×X."""
    b, k, y, x = key.shape
    kind = torch.promote_types(value.dtype, torch.float32)
    grid = _grid(torch.nan_to_num(offset.to(kind), nan=FAR).clamp(-FAR, FAR))
    cells = torch.cat([key, value], 1).to(kind)
    sampled = F.grid_sample(cells, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    keys, values = sampled.view(b, -1, offset.shape[1] // 2, y, x).split([k, value.shape[1]], 1)
    return cells, grid, keys, values


def _grid(offset: Tensor) -> Tensor:
    """Offsets B×2N×Y×X in pixels -> sampling grid B×(N·Y)×X×2 in GridSample's coordinates (x first, -1..1)."""
    b, n2, y, x = offset.shape
    split = offset.view(b, n2 // 2, 2, y, x)
    rows = torch.arange(y, dtype=offset.dtype, device=offset.device).view(y, 1)
    columns = torch.arange(x, dtype=offset.dtype, device=offset.device)
    # align_corners=False puts the centre of pixel i at (2i + 1) / size - 1
    grid_y = (split[:, :, 0] + rows) * (2.0 / y) + (1.0 / y - 1.0)
    grid_x = (split[:, :, 1] + columns) * (2.0 / x) + (1.0 / x - 1.0)
    return torch.stack([grid_x, grid_y], -1).view(b, -1, x, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> None:
    if query.dim() != 4 or not query.shape[1]:
        raise InputError(f"query is {tuple(query.shape)}; expected B×K×Y×X with K of at least 1")
    b, k, y, x = query.shape
    if key.shape != query.shape:
        raise InputError(f"key is {tuple(key.shape)}; expected query's shape {(b, k, y, x)}")
    if value.dim() != 4 or (value.shape[0], *value.shape[2:]) != (b, y, x) or not value.shape[1]:
        raise InputError(f"value is {tuple(value.shape)}; expected {(b, 'V', y, x)} with V of at least 1")
    if offset.dim() != 4 or (offset.shape[0], *offset.shape[2:]) != (b, y, x) or offset.shape[1] % 2:
        raise InputError(f"offset is {tuple(offset.shape)}; expected {(b, '2N', y, x)}")
    if not 1 <= offset.shape[1] // 2 <= MAX_SAMPLES:
        raise InputError(f"offset has {offset.shape[1] // 2} positions a pixel; expected 1 to {MAX_SAMPLES}")


def _forward(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    inputs = (query, key, value, offset)
    return fused.forward(*inputs) if fused.takes(*inputs) else _like(reference(*inputs), value)


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    inputs = (query, key, value, offset)
    if fused.takes(grad, *inputs):
        return fused.backward(grad, *inputs)
    return tuple(map(_like, _backward_of_reference(grad, *inputs), inputs))


def _backward_of_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offset: Tensor
) -> tuple[Tensor, ...]:
    """Written out: below its own place in torch's dispatcher, and in inference mode, autograd records nothing."""
    b, k, y, x = query.shape
    n = offset.shape[1] // 2
    if not value.numel():
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value), torch.zeros_like(offset)
    # sampled anew instead of kept since the forward pass: slower by that, but the N·(K+V) maps live for a moment only
    cells, grid, keys, values = _sample(key, value, offset)
    query, grad = query.to(keys).unsqueeze(2), grad.to(keys).unsqueeze(2)
    affinity = ((query * keys).sum(1) * k**-0.5).softmax(1)
    by_value = (grad * values).sum(1)
    slope = (affinity * (by_value - (affinity * by_value).sum(1, keepdim=True)) * k**-0.5).unsqueeze(1)
    by_sample = torch.cat([slope * query, affinity.unsqueeze(1) * grad], 1).view(b, -1, n * y, x)
    by_cell, by_grid = torch.ops.aten.grid_sampler_2d_backward(by_sample, cells, grid, 0, 0, False, [True, True])
    by_grid = by_grid.view(b, n, y, x, 2)
    by_offset = torch.stack([by_grid[..., 1] * (2.0 / y), by_grid[..., 0] * (2.0 / x)], 2).flatten(1, 2)
    return (slope * keys).sum(2), by_cell[:, :k], by_cell[:, k:], by_offset


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """In the type and memory layout that the registered shapes promise."""
    return torch.empty_like(other).copy_(tensor)


_library = torch.library.Library("ddsm", "DEF")
_library.define("dynamic_sample_attention(Tensor query, Tensor key, Tensor value, Tensor offset) -> Tensor")
_library.define(
    "dynamic_sample_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor offset)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
# CompositeExplicitAutograd: any device, and torch.export keeps one node
_library.impl("dynamic_sample_attention", _forward, "CompositeExplicitAutograd")
_library.impl("dynamic_sample_attention_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("ddsm::dynamic_sample_attention", lib=_library)  # type: ignore[untyped-decorator]
def _(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    return torch.empty_like(value)


@torch.library.register_fake("ddsm::dynamic_sample_attention_backward", lib=_library)  # type: ignore[untyped-decorator]
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(offset)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.ddsm.dynamic_sample_attention_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("ddsm::dynamic_sample_attention", _differentiate, setup_context=_keep, lib=_library)
