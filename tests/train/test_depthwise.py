"""Depthwise convolutions train as torch's own do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ddsm_deploy.train.depthwise import DepthwiseConv2d, speed_up_depthwise


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 16, 5, padding=2, groups=8, bias=False),
    )


def test_only_plain_depthwise_convolutions_change_and_weights_keep_their_names() -> None:
    changed = network()
    before = changed.state_dict()
    speed_up_depthwise(changed)
    assert [type(module) is DepthwiseConv2d for module in changed] == [False, True, False, False, False]
    assert changed.state_dict().keys() == before.keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_results_and_gradients_are_torchs(precision: str) -> None:
    torch.manual_seed(0)
    plain = network()
    changed = copy.deepcopy(plain)
    speed_up_depthwise(changed)
    image = torch.randn(2, 3, 17, 20)
    results = []
    for one in (plain, changed):
        x = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = one(x)
        y.float().square().mean().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in one.parameters())])
    # in bfloat16 torch rounds what it adds up to 8 bits
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "fp32" else {"rtol": 0.02, "atol": 2e-3}
    for wanted, got in zip(*results, strict=True):
        assert wanted is not None and got is not None
        torch.testing.assert_close(got, wanted, **tolerance)


def test_a_frozen_weight_has_no_gradient() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False))
    speed_up_depthwise(conv)
    conv[0].weight.requires_grad_(False)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
    assert x.grad is not None and conv[0].weight.grad is None
