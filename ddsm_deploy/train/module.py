"""The Lightning module: losses, schedule, validation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from ddsm_deploy.datasets import IGNORE
from ddsm_deploy.model.blocks import resize
from ddsm_deploy.model.network import SegmentationNetwork
from ddsm_deploy.spec import ModelSpec
from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.data import PADDING
from ddsm_deploy.train.depthwise import speed_up_depthwise
from ddsm_deploy.train.losses import (
    auxiliary_cross_entropy,
    distance_from_teacher,
    faded,
    jaccard_loss,
    ohem_cross_entropy,
)

POLY_POWER = 0.9


class Teacher:
    """A trained network that is only asked.

    No module, so that it is neither trained, nor averaged, nor part of the run's checkpoints.
    """

    def __init__(self, network: SegmentationNetwork, spec: ModelSpec) -> None:
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.mean = torch.tensor(spec.mean).view(1, 3, 1, 1)
        self.std = torch.tensor(spec.std).view(1, 3, 1, 1)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """uint8 B×3×H×W (RGB) -> logits B×classes×H×W."""
        if self.mean.device != image.device:  # the first call on an accelerator
            self.network.to(image.device)
            self.mean, self.std = self.mean.to(image.device), self.std.to(image.device)
        image = ((image.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.network(image)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # the averaged weights' copy of the task shares it


class SegmentationTask(pl.LightningModule):
    """Trains a network. The auxiliary heads live here and not in the network, so no artefact carries them."""

    class_weights: Tensor

    def __init__(
        self,
        network: SegmentationNetwork,
        spec: ModelSpec,
        config: TrainConfig,
        weights: Tensor,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        speed_up_depthwise(network)
        self.network = network
        self.spec = spec
        self.config = config
        self.teacher = teacher
        classes = len(spec.classes)
        levels = range(4 if spec.network.detail else 3) if config.aux_weight else ()
        self.auxiliary = nn.ModuleList(nn.Conv2d(spec.network.channels, classes, 1) for _ in levels)
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE)
        self.register_buffer("class_weights", weights, persistent=False)
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 B×3×H×W (RGB) -> what the network expects."""
        return ((image.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        image, labels = batch
        inside = labels != PADDING
        labels = labels.masked_fill(~inside, IGNORE)
        levels = self.network.pyramid(self.normalise(image))
        logits = resize(self.network.head(levels[0]), image.shape[-2:])
        weight = self.weights_now()
        loss = ohem_cross_entropy(logits, labels, easy=self.config.ohem, weight=weight)
        if self.config.jaccard:
            loss = loss + self.config.jaccard * jaccard_loss(logits, labels)
        if self.teacher is not None:
            loss = loss + self.config.distill * distance_from_teacher(logits, self.teacher(image), inside)
        for level, head in zip(levels[1:], self.auxiliary, strict=False):
            aux = auxiliary_cross_entropy(head(level), labels, weight=weight)
            loss = loss + self.config.aux_weight * aux
        self.log("train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(image), sync_dist=True)
        return loss

    def weights_now(self) -> Tensor:
        """Weight of each class at this step."""
        if self.config.class_weights != "fade":
            return self.class_weights
        done = self.global_step / max(1, int(self.trainer.estimated_stepping_batches))
        return faded(self.class_weights, done)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        image, labels = batch
        self.confusion.update(self.network(self.normalise(image)).argmax(1), labels)

    def validation_miou(self) -> tuple[float, list[float]]:
        """mIoU in percent over the classes that occur, and each class's IoU (nan where it does not occur)."""
        matrix = self.confusion.compute().double()
        hit = matrix.diag()
        iou = 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)
        return float(iou.nanmean()), iou.tolist()

    def configure_optimizers(self) -> Any:
        config = self.config
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            rate = config.lr
            if name.startswith("network.backbone."):
                rate *= config.backbone_lr
            elif ".offset." in name:
                rate *= config.offset_lr
            decay = config.weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        optimizer = torch.optim.AdamW([{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()])
        total = max(1, int(self.trainer.estimated_stepping_batches))
        warmup = config.warmup_epochs * total / config.epochs

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / max(1.0, warmup)) * max(0.0, 1 - step / total) ** POLY_POWER

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
