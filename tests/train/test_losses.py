"""Losses against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ddsm_deploy.datasets import IGNORE
from ddsm_deploy.train.losses import (
    auxiliary_cross_entropy,
    distance_from_teacher,
    faded,
    jaccard_loss,
    ohem_cross_entropy,
)

ONES = torch.ones(3)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 8, 10, generator=generator)
    labels = torch.randint(0, 3, (2, 8, 10), generator=generator)
    labels[:, :2] = IGNORE
    return logits, labels


def test_without_mining_it_is_torchs_cross_entropy() -> None:
    logits, labels = batch()
    weight = torch.tensor([0.5, 1.0, 3.0])
    mine = ohem_cross_entropy(logits, labels, easy=0.0, weight=weight)
    torch.testing.assert_close(mine, F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORE))


def test_easy_pixels_are_left_out() -> None:
    logits, labels = batch()
    true = logits.softmax(1).gather(1, labels.clamp(max=2).unsqueeze(1)).squeeze(1)
    hard = (labels != IGNORE) & (true < 0.7)
    mine = ohem_cross_entropy(logits, labels, easy=0.7, weight=ONES)
    torch.testing.assert_close(mine, -true[hard].log().mean())


def test_the_hardest_share_counts_where_all_is_easy() -> None:
    labels = torch.zeros(1, 4, 8, dtype=torch.long)
    logits = torch.zeros(1, 3, 4, 8)
    logits[:, 0] = torch.linspace(8, 12, 32).view(1, 4, 8)
    mine = ohem_cross_entropy(logits, labels, easy=0.7, weight=ONES)
    hardest = F.cross_entropy(logits, labels, reduction="none").flatten().topk(2).values  # 32 / 16
    torch.testing.assert_close(mine, hardest.mean())


def test_nothing_labelled_is_zero_and_differentiable() -> None:
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    labels = torch.full((1, 4, 4), IGNORE)
    loss = ohem_cross_entropy(logits, labels, easy=0.7, weight=ONES)
    loss = loss + auxiliary_cross_entropy(logits, labels, weight=ONES) + jaccard_loss(logits, labels)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_auxiliary_labels_are_picked_at_cell_centres() -> None:
    labels = torch.arange(3).repeat_interleave(4).view(1, 1, 12).expand(1, 4, 12)
    logits = torch.full((1, 3, 1, 3), -20.0)
    for column in range(3):
        logits[0, column, 0, column] = 20.0
    assert auxiliary_cross_entropy(logits, labels, weight=ONES) < 1e-6


def test_jaccard_of_certain_answers_is_one_minus_miou() -> None:
    _, labels = batch()
    answers = torch.randint(0, 3, labels.shape, generator=torch.Generator().manual_seed(1))
    logits = 50.0 * F.one_hot(answers, 3).movedim(-1, 1).float()
    valid = labels != IGNORE
    ious = [((labels == c) & (answers == c)).sum() / (valid & ((labels == c) | (answers == c))).sum() for c in range(3)]
    torch.testing.assert_close(jaccard_loss(logits, labels), 1 - torch.stack(ious).mean())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_jaccard_under_autocast_is_float32s(half: torch.dtype) -> None:
    """With more pixels of a class than float16 has numbers."""
    labels = torch.zeros(1, 360, 480, dtype=torch.long)
    labels[:, :60] = 1
    logits = torch.randn(1, 2, 360, 480, generator=torch.Generator().manual_seed(2)).requires_grad_()
    wanted = torch.autograd.grad(jaccard_loss(logits, labels), logits)
    with torch.autocast("cpu", half):
        loss = jaccard_loss(logits, labels)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), wanted)
    assert wanted[0].abs().sum() > 0.1


def test_jaccard_leaves_out_classes_without_labels() -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.long)
    logits = torch.zeros(1, 3, 2, 2)
    torch.testing.assert_close(jaccard_loss(logits, labels), torch.tensor(1 - 1 / 3))  # hit 4/3 of a union of 4


def test_jaccard_gradient() -> None:
    logits, labels = batch()
    logits = logits.double().requires_grad_()
    # the loss computes in float32, so a coarse step and a coarse answer
    assert torch.autograd.gradcheck(lambda x: jaccard_loss(x, labels), logits, eps=1e-2, atol=1e-3, nondet_tol=1e-6)


def test_distance_from_a_teacher_is_the_divergence_from_its_probabilities() -> None:
    logits, _ = batch()
    teacher = 2 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    logits, teacher = logits.requires_grad_(), teacher.requires_grad_()
    p, q = teacher.softmax(1), logits.softmax(1)
    everywhere = torch.ones(2, 8, 10, dtype=torch.bool)
    distance = distance_from_teacher(logits, teacher, everywhere)
    torch.testing.assert_close(distance, (p * (p / q).log()).sum(1).mean())
    assert distance > 0.1
    distance.backward()
    assert teacher.grad is None
    # the gradient of a cross-entropy with the teacher's probabilities for labels
    torch.testing.assert_close(logits.grad, ((q - p) / (2 * 8 * 10)).detach())
    assert distance_from_teacher(teacher + 5.0, teacher, everywhere).abs() < 1e-6  # softmax minds no constant
    inside = everywhere.clone()
    inside[0, :5] = False
    part = distance_from_teacher(logits, teacher, inside)
    torch.testing.assert_close(part, (p * (p / q).log()).sum(1)[inside].mean())


def test_fading_weights_end_at_one() -> None:
    weight = torch.tensor([0.5, 4.0])
    for done, wanted in ((0.0, [0.5, 4.0]), (0.5, [0.5**0.5, 2.0]), (1.0, [1.0, 1.0])):
        torch.testing.assert_close(faded(weight, done), torch.tensor(wanted))
