"""Depthwise convolutions whose gradients are computed in float32, for training in bfloat16 on a CPU.

torch's own bfloat16 backward of depthwise convolutions takes several times as long as the same in float32 where kernels
are 5×5 or the stride is 2 (torch 2.14; `benchmarks/depthwise_backward.py`), and EfficientNets are full of those. The
forward stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad.float(), x.float(), weight.float(), None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), len(weight),
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False),
        )  # fmt: skip
        return (
            of_x.to(x.dtype) if ctx.needs_input_grad[0] else None,
            of_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class DepthwiseConv2d(nn.Conv2d):
    """As `nn.Conv2d` in all but how its gradients are computed on a CPU under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """B×C×H×W -> B×C×H'×W'."""
        if x.device.type != "cpu" or not torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        result: Tensor = _Depthwise.apply(x, self.weight, self.stride, self.padding)
        return result


def speed_up_depthwise(network: nn.Module) -> None:
    """Turns those of a network's depthwise convolutions that gain by it into `DepthwiseConv2d`, in place.

    Names and weights stay. Of 3×3 with stride 1 torch's own gradients are the faster.
    """
    for module in network.modules():
        if (
            type(module) is nn.Conv2d
            and module.groups == module.in_channels == module.out_channels > 1
            and module.bias is None
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and (max(module.kernel_size) > 3 or max(module.stride) > 1)
        ):
            module.__class__ = DepthwiseConv2d
