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
    labelled = int(valid.sum())
    if not labelled:
        return logits.sum() * 0.0
    counted = valid
    if easy > 0:
        detached = losses.detach().masked_fill(~valid, -1.0)
        counted = detached > -math.log(easy)
        least = max(1, int(keep * labelled))
        if int(counted.sum()) < least:
            counted = torch.zeros_like(valid).view(-1)
            counted[detached.view(-1).topk(least).indices] = True
            counted = counted.view_as(valid)
    # weights of zero and not a selection, which would copy
    weights = weight[labels.masked_fill(~valid, 0)] * counted
    return (losses * weights).sum() / weights.sum()


def jaccard_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """One minus the soft intersection over union, mean over the classes that the batch's labels hold.

    Every class counts the same however few its pixels, as in mIoU (soft Jaccard as in Rahman and Wang 2016, summed over
    the batch).

    Args:
        logits: B×classes×H×W.
        labels: int64 B×H×W, class ids or `IGNORE`.

    Returns:
        Between 0 and 1; zero where nothing is labelled.
    """
    valid = labels != IGNORE
    classes = logits.shape[1]
    bins = labels.masked_fill(~valid, classes).flatten()  # the last one is of what is not labelled
    counts = torch.bincount(bins, minlength=classes + 1)[:classes]
    present = counts > 0
    if not bool(present.any()):
        return logits.sum() * 0.0
    # sums over all pixels of an image: autocast would take the product in 16 bits, and float16 ends at 65504
    with torch.autocast(logits.device.type, enabled=False):
        probability = logits.float().softmax(1)
        own = probability.gather(1, labels.masked_fill(~valid, 0).unsqueeze(1)).flatten()
        hit = own.new_zeros(classes + 1).index_add(0, bins, own)[:classes]
        # a product with a vector of zeros and ones, for a sum over the labelled pixels without a copy
        predicted = torch.bmm(probability.flatten(2), valid.float().flatten(1).unsqueeze(2)).sum((0, 2))
        union = predicted + counts - hit
    return 1 - (hit[present] / union[present]).mean()


def distance_from_teacher(logits: Tensor, teacher: Tensor, inside: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the softmax of `logits` from that of `teacher`, mean over the image's pixels.

    Those without a label count too, since the teacher knows something of them; of padding it knows nothing. (Hinton et
    al. 2015, pixel by pixel, at temperature 1: a network that learnt with OHEM is not so sure of itself that its
    answers would have to be softened.)

    Args:
        logits: B×classes×H×W.
        teacher: likewise; nothing flows back into it.
        inside: bool B×H×W, false where there is padding; true somewhere.

    Returns:
        At least 0, in nats.
    """
    own, wanted = logits.float().log_softmax(1), teacher.detach().float().log_softmax(1)
    distance = F.kl_div(own, wanted, reduction="none", log_target=True).sum(1)
    return (distance * inside).sum() / inside.sum()


def faded(weight: Tensor, done: float) -> Tensor:
    """Class weights on their way to 1: as given at `done` 0, all 1 at `done` 1, and in between in proportion of their
    logarithms."""
    return torch.pow(weight, 1 - done)


def auxiliary_cross_entropy(logits: Tensor, labels: Tensor, *, weight: Tensor) -> Tensor:
    """Cross-entropy of a coarse map against labels picked at its cells' centres (nearest). Shapes as above, logits
    smaller."""
    small = F.interpolate(labels.unsqueeze(1).float(), size=logits.shape[-2:], mode="nearest-exact").squeeze(1).long()
    if not (small != IGNORE).any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), small, weight=weight, ignore_index=IGNORE)
