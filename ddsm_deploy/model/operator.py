"""The one operator behind both branches of the Dynamic Dual Sampling Module.

Legend of dimension letters, used in the whole subpackage:

    B  images in a batch        C  channels of the pyramid      N  sampled positions a pixel
    K  channels of query, key   V  channels of value            Y, X  rows and columns of the map
    H, W  of the low layer      h, w  of the next higher layer  a  side of a pooled map

It is registered with torch as ``ddsm::dynamic_sample_attention``, so that `torch.export` sees a single node, which
`ddsm_deploy.export` then writes in the form that a runtime is good at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsm_deploy.errors import InputError


def dynamic_sample_attention(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """Every pixel attends to N positions of its own choice.

    For pixel p and sample n, ``key`` and ``value`` are read bilinearly at ``p + offset_n(p)``, where anything outside
    the map counts as zero; the affinities are the softmax over n of ``query(p) · key_n(p) / sqrt(K)``, and the result
    is the affinity-weighted sum of the sampled values. Coordinates and softmax are computed in float32 at least,
    whatever the precision of the inputs.

    Args:
        query: B×K×Y×X.
        key: B×K×Y×X.
        value: B×V×Y×X.
        offset: B×2N×Y×X, in pixels of the map: channel 2n is the vertical offset of sample n, 2n+1 the horizontal one,
            downwards and rightwards positive.

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
    """The operator in plain PyTorch (GridSample form): the definition that all other forms are tested against.

    Shapes as in `dynamic_sample_attention`. Materialises N·(K+V)·Y·X numbers an image.
    """
    b, k, y, x = query.shape
    n = offset.shape[1] // 2
    kind = torch.promote_types(value.dtype, torch.float32)

    grid = _grid(offset.to(kind))
    sampled = F.grid_sample(
        torch.cat([key, value], 1).to(kind), grid, mode="bilinear", padding_mode="zeros", align_corners=False
    ).view(b, -1, n, y, x)
    keys, values = sampled.split([k, value.shape[1]], 1)
    scores = (query.to(kind).unsqueeze(2) * keys).sum(1) * k**-0.5
    affinity = scores.softmax(1)
    return (values * affinity.unsqueeze(1)).sum(2).to(value.dtype)


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
    b, k, y, x = query.shape
    if key.shape != query.shape:
        raise InputError(f"key is {tuple(key.shape)}; expected query's shape {(b, k, y, x)}")
    if (value.shape[0], *value.shape[2:]) != (b, y, x):
        raise InputError(f"value is {tuple(value.shape)}; expected {(b, 'V', y, x)}")
    if (offset.shape[0], *offset.shape[2:]) != (b, y, x) or offset.shape[1] % 2 or not offset.shape[1]:
        raise InputError(f"offset is {tuple(offset.shape)}; expected {(b, '2N', y, x)}")


# CompositeImplicitAutograd: autograd goes through the reference's own operations, and torch.export still keeps one
# node.
_library = torch.library.Library("ddsm", "DEF")
_library.define("dynamic_sample_attention(Tensor query, Tensor key, Tensor value, Tensor offset) -> Tensor")
_library.impl("dynamic_sample_attention", reference, "CompositeImplicitAutograd")
