"""What `dynamic_sample_attention` is, in PyTorch, so that its gradients are defined as well, on whole offsets too.

The product's `reference` computes positions in GridSample's coordinates, where rounding decides on which side of a
pixel a sample lies that is meant to lie on it. Here an offset is cut into whole pixels and rest, which is exact: a
sample on a pixel belongs to the cell that begins there.
"""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 1e8
"""Pixels; an offset that is not below it leads off any map."""


def by_cells(query: Tensor, key: Tensor, value: Tensor, offset: Tensor) -> Tensor:
    """The operator in float64, differentiable. Shapes as in `dynamic_sample_attention`."""
    query, key, value, offset = (tensor.double().contiguous() for tensor in (query, key, value, offset))
    b, k, y, x = query.shape
    n = offset.shape[1] // 2
    c = k + value.shape[1]
    split = offset.view(b, n, 2, y, x)
    near = torch.where(split.abs() < FAR, split, FAR)  # NaN is not below either
    whole = near.detach().floor()
    rest = near - whole
    rows = whole[:, :, 0].long() + torch.arange(y).view(y, 1)
    columns = whole[:, :, 1].long() + torch.arange(x)
    cells = torch.cat([key, value], 1).flatten(2)
    sampled = torch.zeros(b, c, n, y, x, dtype=torch.float64)
    for down in (0, 1):
        for right in (0, 1):
            row, column = rows + down, columns + right
            inside = (row >= 0) & (row < y) & (column >= 0) & (column < x)
            index = torch.where(inside, row * x + column, 0).view(b, 1, n * y * x).expand(-1, c, -1)
            weight = (rest[:, :, 0] if down else 1 - rest[:, :, 0]) * (rest[:, :, 1] if right else 1 - rest[:, :, 1])
            read = cells.gather(2, index).view(b, c, n, y, x)
            sampled = sampled + torch.where(inside, weight, 0.0).unsqueeze(1) * read
    keys, values = sampled.split([k, value.shape[1]], 1)
    affinity = ((query.unsqueeze(2) * keys).sum(1) * k**-0.5).softmax(1)
    return (values * affinity.unsqueeze(1)).sum(2)
