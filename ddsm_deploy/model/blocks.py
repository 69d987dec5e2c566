"""The blocks of the network: the two sampling branches, the DDSM block, the light context head.

They receive ready numbers; `network.build_network` decides on those. Dimension letters: see `operator.py`. Two habits
keep every exported graph free of operators that a deployment target lacks or runs badly: pooling is a product with two
small matrices (adaptive pooling can't be exported with dynamic sizes), and position embeddings are kept apart by axis,
so that they fold to constants of C·(H + W) numbers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsm_deploy.model.operator import dynamic_sample_attention


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm, and a ReLU if asked for. `zero` starts the output at zero (a learned
    gate)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, *, relu: bool = False, zero: bool = False) -> None:
        norm = nn.BatchNorm2d(outputs)
        if zero:
            nn.init.zeros_(norm.weight)
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            norm,
            *([nn.ReLU(inplace=True)] if relu else []),
        )


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of B×C×h×w to B×C×H×W, pixel centres aligned (half-pixel)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def area_weights(size: int, cells: int, like: Tensor) -> Tensor:
    """Matrix cells×size that averages `size` pixels into `cells` equal cells, fractional borders weighted by area."""
    width = size / cells
    start = torch.arange(cells, dtype=torch.float32, device=like.device).unsqueeze(1) * width
    pixel = torch.arange(size, dtype=torch.float32, device=like.device)
    overlap = torch.minimum(pixel + 1, start + width) - torch.maximum(pixel, start)
    return (overlap.clamp(min=0.0) / width).to(like.dtype)


def area_pool(x: Tensor, cells: int) -> Tensor:
    """B×C×Y×X -> B×C×cells×cells by averaging over equal areas, as two matrix products."""
    y, w = x.shape[-2:]
    rows = torch.matmul(area_weights(y, cells, x), x)
    return torch.matmul(rows, area_weights(w, cells, x).t())


def sine_embedding(size: int, channels: int, like: Tensor) -> Tensor:
    """Sines and cosines of a position normalised to 0..2π: channels×size (Vaswani et al. 2017, normalised as in
    DETR)."""
    position = (torch.arange(size, dtype=torch.float32, device=like.device) + 0.5) * (2 * math.pi / size)
    octaves = 2.0 ** torch.arange(channels // 2, dtype=torch.float32, device=like.device)
    phase = octaves.unsqueeze(1) * position
    return torch.cat([phase.sin(), phase.cos()]).to(like.dtype)


class PositionBias(nn.Module):
    """A learned projection of the sinusoidal embedding, to be added to a query or key map.

    A 1×1 convolution is linear, so ``conv(x + embedding)`` is ``conv(x)`` plus a projection of the embedding; kept by
    axis, that projection is one column and one row instead of a map. Five octaves are enough at stride 4.
    """

    OCTAVES = 5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rows = nn.Linear(2 * self.OCTAVES, channels, bias=False)
        self.columns = nn.Linear(2 * self.OCTAVES, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """B×C×Y×X -> the same, with position added."""
        y, w = x.shape[-2:]
        rows = self.rows(sine_embedding(y, 2 * self.OCTAVES, x).t()).t()
        columns = self.columns(sine_embedding(w, 2 * self.OCTAVES, x).t()).t()
        return x + rows.unsqueeze(-1) + columns.unsqueeze(-2)


def regular_grid(samples: int, dilation: int) -> Tensor:
    """The √N×√N neighbourhood r_n as 2N offsets in pixels, (row, column) interleaved; centred for even √N too."""
    side = math.isqrt(samples)
    steps = (torch.arange(side, dtype=torch.float32) - (side - 1) / 2) * dilation
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], 1).flatten()


def offset_conv(inputs: int, samples: int, dilation: int) -> nn.Conv2d:
    """3×3 convolution that predicts ``r_n + Δ_n``: it starts at Δ = 0, and its bias starts as the regular grid r_n."""
    conv = nn.Conv2d(inputs, 2 * samples, 3, padding=1)
    nn.init.zeros_(conv.weight)
    with torch.no_grad():
        conv.bias.copy_(regular_grid(samples, dilation))
    return conv


class SpatialBranch(nn.Module):
    """Diagram (a): every pixel of the low layer attends to N sampled pixels of the upsampled high layer.

    The branch *is* the upsampling: its values are the high layer's own channels, upsampled, and its result takes their
    place in the sum. Added to them instead, behind a gate that starts at zero, it was hardly used: what it samples was
    in the sum already (docs/experiments.md, e5 to e7). At the start it is a mean over the regular grid.

    Other choices at the paper's open points; what each is worth has not been measured one by one: query and key are
    normalised (BN) and narrower than C, K = `sample_channels`; the key's convolution on ``concat[x_l, x_h']`` is two,
    one on each part, because the high half then runs on the small map (1×1 convolution and bilinear upsampling
    commute); offsets are read from the key map, which has seen both layers. The position embedding enters query and
    key, not value.
    """

    def __init__(self, channels: int, *, sample_channels: int, samples: int, dilation: int) -> None:
        super().__init__()
        self.query = ConvNorm(channels, sample_channels)
        self.key_low = ConvNorm(channels, sample_channels)
        self.key_high = ConvNorm(channels, sample_channels)
        self.query_position = PositionBias(sample_channels)
        self.key_position = PositionBias(sample_channels)
        self.offset = offset_conv(sample_channels, samples, dilation)

    def forward(self, low: Tensor, high: Tensor, value: Tensor) -> Tensor:
        """low B×C×H×W, high B×C×h×w, value B×C×H×W (`high`, upsampled) -> B×C×H×W."""
        key = self.key_low(low) + resize(self.key_high(high), low.shape[-2:])
        offset = self.offset(F.relu(key))
        query = self.query_position(self.query(low))
        return dynamic_sample_attention(query, self.key_position(key), value, offset)


class ChannelBranch(nn.Module):
    """Diagram (b): every channel attends to N sampled channels, laid out as the pixels of a √C×√C plane.

    The attention is linear in its values, and its values are whole channels of `x_h`. So the operator is given the C
    unit vectors as values and returns the C×C mixing matrix, which then multiplies `x_h` at its own size: the same
    function as sampling h·w numbers a channel, but with V = C whatever the image size, and `x_h` needs no downsampling.
    The mixture passes a 1×1 convolution whose norm starts at zero, and is added to `x_h` before the one upsampling.

    At inference all of this is linear in `x_h`: mixing, convolution and norm become one C×C matrix an image.
    """

    def __init__(self, channels: int, *, pooled: int, samples: int) -> None:
        super().__init__()
        self.channels, self.side, self.pooled = channels, math.isqrt(channels), pooled
        entries = pooled * pooled
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(2 * channels, channels, 1)
        self.query_norm = nn.LayerNorm(entries)
        self.key_norm = nn.LayerNorm(entries)
        self.offset = offset_conv(2 * entries, samples, 1)
        self.out = ConvNorm(channels, channels, zero=True)
        units = torch.eye(channels).view(1, channels, self.side, self.side)
        self.register_buffer("units", units, persistent=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low B×C×H×W, high B×C×h×w -> high with the branch added, B×C×h×w."""
        b, c, h, w = high.shape
        mixing = self.mixing(low, high)
        if self.training:  # the norm wants to see the mixture
            return high + self.out(torch.matmul(mixing, high.flatten(2)).view(b, c, h, w))
        conv, norm = self.out
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        matrix = torch.matmul(conv.weight.view(c, c) * scale.unsqueeze(1), mixing)
        shift = (norm.bias - norm.running_mean * scale).view(1, c, 1, 1)
        # `high` is not put into the matrix as its diagonal: rounded to half precision, one plus little is one
        return high + (torch.matmul(matrix, high.flatten(2)).view(b, c, h, w) + shift)

    def mixing(self, low: Tensor, high: Tensor) -> Tensor:
        """low B×C×H×W, high B×C×h×w -> B×C×C: row p weighs the channels of `high` for channel p."""
        b, c = high.shape[:2]
        pooled_low, pooled_high = area_pool(low, self.pooled), area_pool(high, self.pooled)
        query = self._plane(self.query_norm, self.query(pooled_low))
        key = self._plane(self.key_norm, self.key(torch.cat([pooled_low, pooled_high], 1)))
        offset = self.offset(torch.cat([query, key], 1))
        units = self.units.to(query.dtype).expand(b, -1, -1, -1)
        columns = dynamic_sample_attention(query, key, units, offset)  # B×C×√C×√C: column p is for channel p
        return columns.view(b, c, c).transpose(1, 2)

    def _plane(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """B×C×a×a -> B×a²×√C×√C: channels become pixels, each described by its normalised a² entries."""
        described = norm(x.flatten(2))
        return described.transpose(1, 2).reshape(-1, self.pooled * self.pooled, self.side, self.side)


class Fusion(nn.Module):
    """Joins a low layer with the next higher one: ``conv3×3-BN-ReLU(x_l + spatial(up(x_h + channel)))``.

    Without branches this is the plain pyramid's "upsample and add".
    """

    def __init__(self, channels: int, *, spatial: SpatialBranch | None, channel: ChannelBranch | None) -> None:
        super().__init__()
        self.spatial = spatial
        self.channel = channel
        self.merge = ConvNorm(channels, channels, 3, relu=True)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low B×C×H×W, high B×C×h×w -> B×C×H×W."""
        mixed = high if self.channel is None else self.channel(low, high)
        up = resize(mixed, low.shape[-2:])
        if self.spatial is not None:
            up = self.spatial(low, high, up)
        return self.merge(low + up)


class Detail(nn.Module):
    """A narrow level at stride 2: ``dw3×3-1×1-BN-ReLU(ReLU(x_l + up(x_h)))``, both sides brought to `channels` first.

    Poles and far signs are two or three pixels wide: at stride 4 there is nothing left of them to classify.
    """

    def __init__(self, low: int, high: int, channels: int) -> None:
        super().__init__()
        self.low = ConvNorm(low, channels)
        self.high = ConvNorm(high, channels)
        self.spread = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.merge = ConvNorm(channels, channels, relu=True)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """low B×low×H×W, high B×high×h×w -> B×channels×H×W."""
        joined = F.relu(self.low(low) + resize(self.high(high), low.shape[-2:]))
        return self.merge(self.spread(joined))


class ContextHead(nn.Module):
    """A light pyramid pooling head on the top level (Zhao et al. 2017): area pooling to 1, 2 and 4 cells a side."""

    CELLS = (1, 2, 4)

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        branch = channels // 2
        self.lateral = ConvNorm(inputs, channels, relu=True)
        # no batch norm on pooled maps: one cell a channel has no variance in a batch of one
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(channels, branch, 1), nn.ReLU()) for _ in self.CELLS)
        self.merge = ConvNorm(channels + branch * len(self.CELLS), channels, 3, relu=True)

    def forward(self, x: Tensor) -> Tensor:
        """B×inputs×h×w -> B×C×h×w."""
        x = self.lateral(x)
        size = x.shape[-2:]
        pooled = [
            resize(branch(area_pool(x, cells)), size) for cells, branch in zip(self.CELLS, self.branches, strict=True)
        ]
        return self.merge(torch.cat([x, *pooled], 1))
