"""The networks that have a name. Imports no torch, so that a wrong name is told at once."""

from __future__ import annotations

from ddsm_deploy.spec import NetworkConfig

VARIANTS = {
    "ddsm-lite0": NetworkConfig(detail=32),
    "ddsm-lite2": NetworkConfig(backbone="efficientnet_lite2", channels=100, sample_channels=48, detail=48),
    "ddsm-r18": NetworkConfig(backbone="resnet18", channels=64),
    "ddsm-r50": NetworkConfig(backbone="resnet50", channels=144, sample_channels=64),
    "ddsm-r101": NetworkConfig(backbone="resnet101", channels=144, sample_channels=64),
    "fpn-lite0": NetworkConfig(fusion="add", detail=32),
    "fpn-lite2": NetworkConfig(backbone="efficientnet_lite2", fusion="add", channels=100, detail=48),
    "fpn-r18": NetworkConfig(backbone="resnet18", fusion="add"),
}
"""Named variants: each only fills numbers in. ``fpn-*`` are the plain pyramids, the baselines."""
