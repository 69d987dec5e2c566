"""One training run on Lightning: data, loggers, checkpoints, resuming."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import logging
import math
import pickle
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from ddsm_deploy import kernels
from ddsm_deploy.artifact import resolve
from ddsm_deploy.datasets import Dataset
from ddsm_deploy.errors import ArtifactError, ConfigError, DdsmError, InputError
from ddsm_deploy.interrupt import first_interrupt_asks
from ddsm_deploy.model.checkpoint import load_checkpoint, read_spec, save_checkpoint, start_from
from ddsm_deploy.model.network import build_network, load_imagenet, synchronise_norms
from ddsm_deploy.spec import ModelSpec
from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.data import EvalImages, TrainImages, class_weights
from ddsm_deploy.train.files import BEST, CONFIG, FINAL, LAST, plain_values
from ddsm_deploy.train.module import SegmentationTask, Teacher


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
        checkpoint: the best epoch's network.
        miou: its validation mIoU, percent.
        epoch: that epoch, from 0.
        final: the last epoch's network, in whose choice validation had no part.
        final_miou: its validation mIoU, percent.
    """

    checkpoint: Path
    miou: float
    epoch: int
    final: Path
    final_miou: float


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a kill while saving leaves the previous `last.ckpt` whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        temporary = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, temporary, storage_options)
        temporary.replace(path)


class KeepBest(Callback):
    """Validates, logs, and keeps the best and the newest network as safetensors. Listed before the EMA callback, whose
    averaged weights are still in place when this one runs."""

    def __init__(self, folder: Path) -> None:
        self.best, self.final = folder / BEST, folder / FINAL
        self.miou = -1.0
        self.epoch = -1
        self.newest = -1.0

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationTask)
        miou, classes = pl_module.validation_miou()
        pl_module.confusion.reset()
        if trainer.sanity_checking:
            return
        if math.isnan(miou):
            raise InputError("the validation split has no pixel of a class; look at its labels, and at classes.json")
        pl_module.log("val/miou", miou, prog_bar=True, sync_dist=True)  # the same on every device
        for name, iou in zip(pl_module.spec.classes, classes, strict=True):
            pl_module.log(f"val/iou/{name}", iou, sync_dist=True)
        paths = [self.final]
        self.newest = miou
        if miou > self.miou:
            self.miou, self.epoch = miou, trainer.current_epoch
            paths.append(self.best)
        if trainer.is_global_zero:
            spec = pl_module.spec.with_provenance(val_miou=f"{miou:.2f}", epoch=str(trainer.current_epoch))
            for path in paths:
                save_checkpoint(path, pl_module.network, spec)

    def state_dict(self) -> dict[str, Any]:
        return {"miou": self.miou, "epoch": self.epoch, "newest": self.newest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.miou, self.epoch = state_dict["miou"], state_dict["epoch"]
        with contextlib.suppress(ArtifactError, KeyError, ValueError):  # none is there
            there = read_spec(self.best).provenance
            miou = float(there["val_miou"])
            if miou > self.miou + 0.01:  # a kill came between the two files; what is written there is rounded
                self.miou, self.epoch = miou, int(there["epoch"])
        self.newest = state_dict.get("newest", self.newest)  # runs begun before there was one go on all the same


class StopBetweenBatches(Callback):
    """Ends the run by KeyboardInterrupt at the next batch once `stop` is set.

    Where Ctrl-C itself raised it, that could be while the main thread held what TensorBoard's thread waits for, and the
    run never ended.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()

    def on_train_batch_start(self, *_: Any) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt

    def on_validation_batch_start(self, *_: Any) -> None:
        self.on_train_batch_start()


def fit(config: TrainConfig, training: Dataset, validation: Dataset, progress: Callable[[str], None]) -> TrainResult:
    """The loop of `ddsm_deploy.train.train`, on the data that `open_run` has found."""
    pl.seed_everything(seed_of(config), workers=True, verbose=False)
    task = _task(config, training, progress)
    best, stopping = KeepBest(config.output), StopBetweenBatches()
    try:
        with _quiet():
            trainer = _trainer(config, [stopping, best])
    except (MisconfigurationException, ValueError) as exc:
        raise ConfigError(
            f"{' '.join(str(exc).split())} (accelerator {config.accelerator}, devices {config.devices})"
        ) from exc
    if hint := slow_sampling(config, trainer.strategy.root_device.type):
        progress(hint)
    device = trainer.strategy.root_device.type
    if config.precision == "fp16" and device == "cpu":
        raise ConfigError("no training in fp16 on a CPU; take --precision bf16 or fp32")
    if (least := min(len(training.samples), len(validation.samples))) < trainer.world_size:
        raise ConfigError(f"{least} images can't be shared out over {trainer.world_size} devices; take fewer devices")
    if trainer.world_size > 1 and device == "cuda":
        synchronise_norms(task.network)
    _record(config)
    data = Loaders(TrainImages(training, config), EvalImages(validation, config), config)
    try:
        with _quiet(), first_interrupt_asks() as stopping.stop:
            # weights_only: tensors and plain values, nothing in the file is executed
            trainer.fit(task, data, ckpt_path=config.output / LAST if config.resume else None, weights_only=True)
    except SystemExit:
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None  # Lightning makes exit code 1 of it, as if the run had failed
    except DdsmError as exc:
        # of a worker process it comes with that one's traceback
        raise type(exc)(str(exc).rpartition(f"{type(exc).__name__}: ")[2].strip()) from exc
    return TrainResult(best.best, best.miou, best.epoch, best.final, best.newest)


def _task(config: TrainConfig, training: Dataset, progress: Callable[[str], None]) -> SegmentationTask:
    classes = training.classes
    network = build_network(config.network, len(classes.names))
    teacher = _teacher(config, classes.names)
    facts: dict[str, Any] = {}
    if config.init is not None:
        source = resolve(config.init).file("checkpoint")
        new, unused = start_from(network, source)
        if new or unused:
            progress(f"{config.init}: {len(new)} tensors start afresh ({_modules(new)}), {len(unused)} are left out")
        origin = read_spec(source)
        facts["mean"], facts["std"] = origin.mean, origin.std
    elif config.pretrained:
        facts["mean"], facts["std"] = load_imagenet(network.backbone, config.network.backbone)
    network.to(memory_format=torch.channels_last)
    spec = ModelSpec(
        name=config.output.name,
        classes=classes.names,
        palette=classes.palette,
        height=config.height,
        width=config.width,
        network=config.network,
        provenance={
            "dataset": f"{config.dataset}/{config.train_split} ({len(training.samples)} images)",
            "torch": torch.__version__,
            "schedule": f"{config.epochs} epochs, batch {config.batch}, crop {'x'.join(map(str, config.crop))}",
            "seed": str(config.seed),
        },
        **facts,
    )
    weights = [1.0] * len(classes.names) if config.class_weights == "none" else class_weights(training)
    return SegmentationTask(network, spec, config, torch.as_tensor(weights, dtype=torch.float32), teacher)


def _teacher(config: TrainConfig, classes: tuple[str, ...]) -> Teacher | None:
    if config.teacher is None:
        return None
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn too: a run differs by the teacher alone
        network, origin = load_checkpoint(resolve(config.teacher).file("checkpoint"))
    if origin.classes != classes:
        raise ConfigError(
            f"{config.teacher}: a teacher of other classes ({', '.join(origin.classes)}); expected {', '.join(classes)}"
        )
    return Teacher(network, origin)


def _modules(tensors: Iterable[str]) -> str:
    """The modules of some tensors, ``fusions.0.spatial`` for all below that, and none for no tensors."""
    names = dict.fromkeys(".".join(name.split(".")[:3]) for name in tensors)
    return ", ".join(names) or "none"


def _trainer(config: TrainConfig, callbacks: list[Callback]) -> pl.Trainer:
    callbacks = [*callbacks]
    if config.ema:
        callbacks.append(EMAWeightAveraging(decay=config.ema))
    callbacks.append(
        ModelCheckpoint(
            config.output,
            filename="last",
            save_top_k=1,
            monitor=None,
            enable_version_counter=False,
            save_on_train_epoch_end=True,  # of epochs that are not validated too
        )
    )
    callbacks.append(RichProgressBar(leave=True))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    return pl.Trainer(
        default_root_dir=config.output,
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=config.devices if config.devices == "auto" else int(config.devices),
        precision=lightning_precision(config.precision),
        callbacks=callbacks,
        logger=[
            csv_log(config),
            TensorBoardLogger(str(config.output), name=None, version="logs"),
        ],
        plugins=[AtomicCheckpointIO()],
        gradient_clip_val=5.0,
        use_distributed_sampler=False,  # `Loaders` shares the images out
        num_sanity_val_steps=1,
        check_val_every_n_epoch=config.validate_every,
        log_every_n_steps=10,
        enable_model_summary=False,
    )


def csv_log(config: TrainConfig) -> CSVLogger:
    """Lightning's CSV log; of a run that goes on with what it held up to the checkpoint, where Lightning deletes it."""
    logger = CSVLogger(config.output, name=None, version="logs")
    path = config.output / "logs" / "metrics.csv"
    if not config.resume or not path.is_file() or rank_zero_only.rank:  # one process of several writes
        return logger
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows, names = list(reader), list(reader.fieldnames or ())
    steps = _steps_done(config)
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        # the last line may be half of one
        writer.writerows(row for row in rows if (row["step"] or "").isdigit() and int(row["step"]) < steps)
    with _quiet():
        experiment = logger.experiment  # made here, which deletes the file
    experiment.metrics_keys = names
    temporary.replace(path)
    return logger


def seed_of(config: TrainConfig) -> int:
    """The seed from here on. A run that goes on has another, or the order and crops of its first epochs came again."""
    return (config.seed + 1_000_003 * _steps_done(config)) % 2**32 if config.resume else config.seed


def slow_sampling(config: TrainConfig, device: str) -> str:
    """What to tell where the network samples by standard operators although `device` has better; else empty."""
    if config.network.fusion == "add" or device != "cpu" or kernels.status().available:
        return ""
    return f"training is slower than it could be, since DDSM samples by standard operators: {kernels.status().reason}"


def _steps_done(config: TrainConfig) -> int:
    path = config.output / LAST
    try:
        return int(torch.load(path, weights_only=True, map_location="cpu")["global_step"])
    except (OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as exc:
        raise InputError(f"{path}: damaged, or no checkpoint of a run ({str(exc).splitlines()[0]})") from exc


def lightning_precision(precision: str) -> Any:
    """Lightning's word for ours; ``auto`` is bf16 where the hardware computes in it, since emulation is many times
    slower."""
    if precision == "auto":
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = (
            not torch.cuda.is_available()
            and torch.backends.mkldnn.is_available()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        precision = "bf16" if on_gpu or on_cpu else "fp32"
    return {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[precision]


class Loaders(pl.LightningDataModule):
    """The images, shared out over the devices: for training padded to the same number, for validation each once, or the
    score would count some twice."""

    def __init__(self, training: TrainImages, validation: EvalImages, config: TrainConfig) -> None:
        super().__init__()
        self.training, self.validation, self.config = training, validation, config

    def train_dataloader(self) -> DataLoader[Any]:
        world, rank = self._place()
        own = math.ceil(len(self.training) / world)
        sampler: DistributedSampler[Any] | None = None
        if world > 1:
            sampler = DistributedSampler(self.training, world, rank, shuffle=True, seed=seed_of(self.config))
        return self._loader(self.training, sampler=sampler, shuffle=sampler is None, drop_last=own >= self.config.batch)

    def val_dataloader(self) -> DataLoader[Any]:
        world, rank = self._place()
        return self._loader(self.validation, sampler=range(rank, len(self.validation), world))

    def _place(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(self, images: Any, **options: Any) -> DataLoader[Any]:
        workers = self.config.workers
        return DataLoader(
            images,
            batch_size=self.config.batch,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_interrupts,
            **options,
        )


def _leave_interrupts(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes; one that loads images would end before the run that waits for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off stderr what Lightning says of itself: its own deprecations, hints, our folder that is not empty."""
    with warnings.catch_warnings():
        for text in (
            "Checkpoint directory",
            ".*LeafSpec",
            "The number of training batches",
            "The '.*_dataloader'",
            "Experiment logs",
            "You passed `Trainer.*16-mixed",
        ):
            warnings.filterwarnings("ignore", message=text)
        yield


def _record(config: TrainConfig) -> None:
    (config.output / CONFIG).write_text(json.dumps(plain_values(config), indent=2) + "\n", encoding="utf-8")
