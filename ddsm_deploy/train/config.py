"""TrainConfig: everything that one training run is made of, checked once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.spec import NetworkConfig

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CLASS_WEIGHTS = ("none", "sqrt", "fade")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        data: root folder of the data set.
        output: folder of the run: logs, `last.ckpt` for resuming, `best.safetensors`.
        dataset: ``camvid``, ``cityscapes`` or ``folder`` (see `ddsm_deploy.datasets.open_dataset`).
        train_split: name of the split to learn from.
        val_split: name of the split that chooses the best checkpoint.
        network: the network's numbers.
        init: a checkpoint or a shipped model's name, with the same backbone: the start instead of ImageNet weights.
            What it lacks or has in another shape, such as a head for other classes, starts afresh.
        teacher: a checkpoint or a shipped model's name, with the same classes, whose probabilities the network learns
            besides the labels (knowledge distillation, Hinton et al. 2015): of a larger network than it is itself.
        distill: weight of the distance from the teacher's probabilities, above 0.
        pretrained: start the backbone from ImageNet weights.
        height: rows of the deployed input, pixels; validation images are resized to it.
        width: columns likewise.
        crop: rows and columns of a training crop, pixels.
        scale: least and greatest random scale before cropping.
        rare_crops: share of the crops that are laid around a pixel of a rare class.
        strong_photometric: share of the crops whose light and colours are changed so much that they could be of another
            time of day, weather or camera; the others are changed a little.
        epochs: passes over the training split.
        validate_every: epochs from one validation to the next; it divides `epochs`.
        batch: images a step and device.
        lr: peak learning rate of the pyramid and head (AdamW, poly decay of power 0.9).
        backbone_lr: its multiple for the pretrained backbone.
        offset_lr: its multiple for the convolutions that predict offsets.
        weight_decay: AdamW's, on weights of two or more dimensions.
        warmup_epochs: epochs of linear warm-up.
        ema: decay a step of the averaged weights that are validated and kept; 0 switches it off.
        ohem: pixels whose true class has at least this probability count as easy and are left out; 0 keeps all.
        jaccard: weight of the soft Jaccard loss, which counts every class the same; 0 switches it off.
        aux_weight: weight of the auxiliary losses at the strides above the finest; 0 switches them off.
        class_weights: ``sqrt`` weighs a class by the square root of median over own frequency, ``none`` does not;
            ``fade`` begins with the one, so that rare classes are learnt soon, and ends with the other, so that they
            are not overrated.
        precision: ``auto`` is bf16 where the hardware computes it, else fp32.
        workers: processes that load and augment.
        devices: how many devices, or ``auto``; more than one train with Lightning's own strategy.
        accelerator: Lightning's word: ``auto``, ``cpu``, ``gpu``…
        seed: of weights, order and augmentation.
        resume: go on from `last.ckpt` in `output`.
    """

    data: Path
    output: Path
    dataset: str = "camvid"
    train_split: str = "train"
    val_split: str = "val"
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    init: Path | None = None
    teacher: Path | None = None
    distill: float = 4.0
    pretrained: bool = True
    height: int = 360
    width: int = 480
    crop: tuple[int, int] = (360, 480)
    scale: tuple[float, float] = (0.75, 2.0)
    rare_crops: float = 0.5
    strong_photometric: float = 0.5
    epochs: int = 60
    validate_every: int = 1
    batch: int = 4
    lr: float = 1.5e-3
    backbone_lr: float = 0.5
    offset_lr: float = 0.3
    weight_decay: float = 0.02
    warmup_epochs: float = 1.0
    ema: float = 0.995
    ohem: float = 0.7
    jaccard: float = 0.5
    aux_weight: float = 0.3
    class_weights: str = "fade"
    precision: str = "auto"
    workers: int = 2
    devices: str = "auto"
    accelerator: str = "auto"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; expected one of {', '.join(PRECISIONS)}")
        if self.class_weights not in CLASS_WEIGHTS:
            raise ConfigError(f"class weights are {self.class_weights!r}; expected one of {', '.join(CLASS_WEIGHTS)}")
        for name in ("height", "width", "epochs", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.validate_every < 1 or self.epochs % self.validate_every:
            raise ConfigError(
                f"validate_every is {self.validate_every}, epochs {self.epochs}; expected a divisor, for the last "
                "epoch has to be validated"
            )
        if min(self.crop) < 32 or self.height < 32 or self.width < 32:
            raise ConfigError("crop and input size must be at least 32x32: the top level has stride 32")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is {self.scale}; expected two numbers above zero, the lesser first")
        if not 0 <= self.ema < 1 or not 0 <= self.ohem < 1:
            raise ConfigError("ema and ohem must lie within 0 (included) and 1 (not)")
        for name in ("rare_crops", "strong_photometric"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        for name in ("lr", "backbone_lr", "offset_lr", "weight_decay", "warmup_epochs", "workers", "seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0")
        if self.jaccard < 0 or self.aux_weight < 0:
            raise ConfigError("jaccard and aux_weight are weights of losses; expected at least 0")
        if self.distill <= 0:
            raise ConfigError(f"distill is {self.distill}; expected more than 0")
        if self.devices != "auto" and (not self.devices.isdigit() or int(self.devices) < 1):
            raise ConfigError(f"devices is {self.devices!r}; expected auto or a number of at least 1")
