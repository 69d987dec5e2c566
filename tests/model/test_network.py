"""Blocks and networks: shapes, the promises that docstrings make, the graph's forbidden operators."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.model.blocks import ChannelBranch, Fusion, SpatialBranch, area_pool, regular_grid
from ddsm_deploy.model.network import build_network, load_imagenet
from ddsm_deploy.model.operator import reference
from ddsm_deploy.model.variants import VARIANTS
from ddsm_deploy.spec import NetworkConfig


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"ddsm-r101"}))
def test_variants_give_logits_at_the_inputs_size(variant: str) -> None:
    network = build_network(VARIANTS[variant], 5).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 65, 97)).shape == (1, 5, 65, 97)  # no multiple of the stride


@pytest.mark.parametrize(("fusion", "samples"), [("ddsm", 1), ("spatial", 1), ("channel", 9), ("add", 9)])
def test_every_fusion_starts_as_the_plain_pyramid(fusion: str, samples: int) -> None:
    """The spatial branch with one sample, at the start the pixel itself; the channel branch behind its gate."""
    torch.manual_seed(0)
    low, high = torch.randn(2, 16, 12, 14), torch.randn(2, 16, 6, 7)
    plain = Fusion(16, spatial=None, channel=None).eval()
    torch.testing.assert_close(fused(fusion, samples, plain)(low, high), plain(low, high))


def test_spatial_branch_starts_as_a_mean_over_the_regular_grid() -> None:
    """Weights that sum to one: what does not change within the grid's reach stays as it is."""
    torch.manual_seed(0)
    branch = SpatialBranch(16, sample_channels=8, samples=9, dilation=1).eval()
    low, high = torch.randn(1, 16, 12, 14), torch.randn(1, 16, 6, 7)
    value = torch.randn(1, 16, 12, 14)
    value[..., 2:9, 3:12] = torch.arange(16.0).view(1, 16, 1, 1)
    sampled = branch(low, high, value)
    torch.testing.assert_close(sampled[..., 3:8, 4:11], value[..., 3:8, 4:11])
    around = torch.nn.functional.max_pool2d(value, 3, 1, 1)
    assert (sampled[..., 1:-1, 1:-1] <= around[..., 1:-1, 1:-1] + 1e-4).all()  # outside the map, zeros count too


def fused(fusion: str, samples: int, plain: Fusion) -> Fusion:
    """A fusion with the branches of `fusion`, fresh, and the last convolution of `plain`."""
    spatial = SpatialBranch(16, sample_channels=8, samples=samples, dilation=1)
    channel = ChannelBranch(16, pooled=4, samples=samples)
    result = Fusion(
        16,
        spatial=spatial if fusion in ("ddsm", "spatial") else None,
        channel=channel if fusion in ("ddsm", "channel") else None,
    ).eval()
    result.merge = plain.merge
    return result


def test_every_parameter_learns_once_the_gates_are_open() -> None:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(backbone="resnet10t", channels=16, sample_channels=8), 4)
    for fusion in network.fusions:
        torch.nn.init.ones_(fusion.channel.out[1].weight)
        for branch in (fusion.spatial, fusion.channel):
            torch.nn.init.normal_(branch.offset.weight, std=0.01)
    network(torch.randn(2, 3, 64, 96)).square().mean().backward()
    own = [
        (n, p) for n, p in network.named_parameters() if not n.startswith("backbone.")
    ]  # timm starts some gates at zero
    dead = [name for name, p in own if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_channel_branch_equals_sampling_the_channels_themselves() -> None:
    """The mixing matrix times `x_h` is the paper's formulation: whole channels as values on the plane."""
    torch.manual_seed(0)
    c, a = 16, 4
    branch = ChannelBranch(c, pooled=a, samples=9).eval()
    torch.nn.init.normal_(branch.offset.weight, std=0.05)
    torch.nn.init.ones_(branch.out[1].weight)
    low, high = torch.randn(2, c, 12, 10), torch.randn(2, c, 6, 5)
    pooled = [area_pool(x, a) for x in (low, high)]
    query = branch._plane(branch.query_norm, branch.query(pooled[0]))
    key = branch._plane(branch.key_norm, branch.key(torch.cat(pooled, 1)))
    offset = branch.offset(torch.cat([query, key], 1))
    values = high.flatten(2).transpose(1, 2).reshape(2, 30, 4, 4)  # h·w "channels" on the √C×√C plane
    direct = reference(query, key, values, offset).flatten(2).transpose(1, 2).reshape(2, c, 6, 5)
    torch.testing.assert_close(branch(low, high), high + branch.out(direct), rtol=1e-4, atol=1e-5)
    branch.train()
    branch.out.eval()  # the norm as at inference: the other way to compute it must give the same
    torch.testing.assert_close(branch(low, high), high + branch.out(direct), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "cells"), [(12, 16, 4), (6, 6, 1), (8, 24, 8)])
def test_area_pool_equals_torchs_where_cells_are_whole(rows: int, columns: int, cells: int) -> None:
    x = torch.randn(2, 3, rows, columns)
    torch.testing.assert_close(area_pool(x, cells), F.adaptive_avg_pool2d(x, cells))


def test_area_pool_weighs_fractions() -> None:
    x = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    # cells of 1.5 pixels: (1 + 2/2) / 1.5 and (2/2 + 4) / 1.5; one row spread over two cells is itself
    expected = torch.tensor([[2 / 1.5, 5 / 1.5]]).expand(2, 2)
    torch.testing.assert_close(area_pool(x, 2)[0, 0], expected)


def test_regular_grid_is_centred_and_dilated() -> None:
    rows, columns = regular_grid(9, 2).view(9, 2).unbind(1)
    assert rows.tolist() == [-2, -2, -2, 0, 0, 0, 2, 2, 2]
    assert columns.tolist() == [-2, 0, 2] * 3
    assert regular_grid(1, 3).tolist() == [0, 0]


def test_detail_adds_a_level_at_stride_2() -> None:
    config = NetworkConfig(backbone="resnet10t", channels=16, sample_channels=8, detail=12)
    network = build_network(config, 4).eval()
    levels = network.pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (12, 32, 48), (16, 16, 24), (16, 8, 12), (16, 4, 6), (16, 2, 3),
    ]  # fmt: skip
    assert network(torch.randn(1, 3, 50, 70)).shape == (1, 4, 50, 70)


def test_enlarging_inside_is_enlarging_before() -> None:
    torch.manual_seed(0)
    config = NetworkConfig(backbone="resnet10t", channels=16, sample_channels=8)
    plain = build_network(config, 4).eval()
    inside = build_network(dataclasses.replace(config, enlarge=1.5), 4).eval()
    inside.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 64, 96)
    larger = F.interpolate(image, size=(96, 144), mode="bilinear", align_corners=False)
    for got, wanted in zip(inside.pyramid(image), plain.pyramid(larger), strict=True):
        torch.testing.assert_close(got, wanted)
    assert inside(image).shape == (1, 4, 64, 96)


def test_unknown_and_unfit_backbones() -> None:
    with pytest.raises(ConfigError, match="no backbone"):
        build_network(NetworkConfig(backbone="no_such_net"), 3)
    with pytest.raises(ConfigError, match="strides"):
        build_network(NetworkConfig(backbone="vit_tiny_patch16_224"), 3)
    with pytest.raises(ConfigError, match="laid out NHWC"):
        build_network(NetworkConfig(backbone="swin_tiny_patch4_window7_224"), 3)
    build_network(NetworkConfig(backbone="convnext_atto", channels=16), 3)
    with pytest.raises(ConfigError, match="expected 2, 4, 8, 16 and 32 among them"):
        build_network(NetworkConfig(backbone="convnext_atto", channels=16, detail=8), 3)


@pytest.mark.parametrize("backbone", ["convnext_atto", "resnet10t", "test_efficientnet"])
def test_weights_of_the_hub_reach_the_backbone(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the hub's cache, offline; convnext's tensors have other names in a feature extractor."""
    source = timm.create_model(backbone, pretrained=False).eval()
    name = source.pretrained_cfg["hf_hub_id"].replace("/", "--")
    snapshot, refs = tmp_path / f"models--{name}" / "snapshots" / "0", tmp_path / f"models--{name}" / "refs"
    snapshot.mkdir(parents=True)
    refs.mkdir()
    (refs / "main").write_text("0")
    safetensors.torch.save_file(source.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    network = build_network(NetworkConfig(backbone=backbone, channels=16), 3).eval()
    x = torch.randn(1, 3, 64, 64)
    want = source.forward_intermediates(x, intermediates_only=True)[-1]
    assert not torch.allclose(network.backbone(x)[-1], want)
    mean, _ = load_imagenet(network.backbone, backbone)
    torch.testing.assert_close(network.backbone(x)[-1], want)
    assert mean == pytest.approx((123.675, 116.28, 103.53))
    assert "nexpected" not in capfd.readouterr().err
