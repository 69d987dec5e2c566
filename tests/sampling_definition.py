"""What `dynamic_sample_attention` is: its definition with loops, in float64, which shares no code with the product."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def by_loops(query: Array, key: Array, value: Array, offset: Array) -> Array:
    """The operator, pixel by pixel, in plain numbers. Shapes as in `dynamic_sample_attention`; any float type."""
    query, key, value, offset = (np.asarray(tensor, dtype=np.float64) for tensor in (query, key, value, offset))
    b, k, rows, columns = query.shape
    v, n = value.shape[1], offset.shape[1] // 2
    result = np.zeros((b, v, rows, columns))
    for i in range(b):
        for y in range(rows):
            for x in range(columns):
                places = [(y + float(offset[i, 2 * s, y, x]), x + float(offset[i, 2 * s + 1, y, x])) for s in range(n)]
                keys = [_read(key[i], *place) for place in places]
                scores = [
                    sum(q * s for q, s in zip(query[i, :, y, x].tolist(), sampled, strict=True)) / math.sqrt(k)
                    for sampled in keys
                ]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                values = [_read(value[i], *place) for place in places]
                for c in range(v):
                    total = sum(w * sampled[c] for w, sampled in zip(weights, values, strict=True))
                    result[i, c, y, x] = total / sum(weights)
    return result


def _read(image: Array, y: float, x: float) -> list[float]:
    """All channels of an image C×Y×X at one place: zero outside the map, and where the place is no number."""
    channels, rows, columns = image.shape
    total = [0.0] * channels
    if not (math.isfinite(y) and math.isfinite(x)):
        return total
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < rows and 0 <= column < columns:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                cell = image[:, row, column].tolist()
                total = [t + share * c for t, c in zip(total, cell, strict=True)]
    return total
