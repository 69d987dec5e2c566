"""Losses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddsm_deploy.datasets import IGNORE


def ohem_cross_entropy(logits: Tensor, labels: Tensor, *, easy: float, weight: Tensor, keep: float = 1 / 16) -> Tensor:
    """Cross-entropy over the hard pixels of a batch (online hard example mining, Shrivastava et al. 2016).

    Args:
        logits: B×classes×H×W.
        labels: int64 B×H×W, class ids or `IGNORE`.
        easy: pixels whose true class has at least this probability are left out; 0 keeps all.
        weight: one weight a class.
        keep: at least this share of the labelled pixels counts, the hardest first.

    Returns:
        The mean over the pixels kept, weighted by class; zero where nothing is labelled.
    """
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    valid = labels != IGNORE
    losses, weights = losses[valid], weight[labels[valid]]
    if not losses.numel():
        return logits.sum() * 0.0
    if easy > 0:
        least = max(1, int(keep * losses.numel()))
        hard = losses.detach() > -math.log(easy)
        if int(hard.sum()) < least:
            hard = torch.zeros_like(hard)
            hard[losses.detach().topk(least).indices] = True
        losses, weights = losses[hard], weights[hard]
    return (losses * weights).sum() / weights.sum()


def auxiliary_cross_entropy(logits: Tensor, labels: Tensor, *, weight: Tensor) -> Tensor:
    """Cross-entropy of a coarse map against labels picked at its cells' centres (nearest). Shapes as above, logits
    smaller."""
    small = F.interpolate(labels.unsqueeze(1).float(), size=logits.shape[-2:], mode="nearest-exact").squeeze(1).long()
    if not (small != IGNORE).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), small, weight=weight, ignore_index=IGNORE)
