"""The files of a run: the folder that it writes to, and the data that it reads. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ddsm_deploy.datasets import Dataset, open_dataset
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.train.config import TrainConfig

LAST = "last.ckpt"
BEST = "best.safetensors"
FINAL = "final.safetensors"


CONFIG = "config.json"

_FREE = frozenset({"data", "output", "epochs", "validate_every", "workers", "devices", "accelerator", "resume"})
"""Of `TrainConfig`, what may be another when a run goes on."""


_BEFORE = {"rare_crops": 0.0, "jaccard": 0.0, "strong_photometric": 0.0, "teacher": None}
"""What runs did that were begun before there were these options, and whose record lacks them."""


def plain_values(config: TrainConfig) -> dict[str, Any]:
    """A run's numbers as its `CONFIG` holds them."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def open_run(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Makes the output folder, and finds the images to learn from and to validate on.

    Raises:
        ConfigError: the output folder holds another run, or there is none to resume, or it was begun with other
            options; no such kind of data set; the two splits are the same.
        InputError: the folder can't be made, or the data can't be read.
    """
    last = config.output / LAST
    if config.resume and not last.is_file():
        raise ConfigError(f"{config.output}: nothing to resume (no {LAST})")
    if not config.resume and last.exists():
        raise ConfigError(f"{config.output}: holds a run already; go on with it by --resume, or name another folder")
    if config.resume:
        _check_same(config)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"{config.output}: can't be made ({exc.strerror or exc})") from exc
    training = open_dataset(config.dataset, config.data, config.train_split)
    validation = open_dataset(config.dataset, config.data, config.val_split)
    if set(training.samples) == set(validation.samples):
        raise ConfigError(
            f"{config.data}: the splits {config.train_split} and {config.val_split} are the same images, so validation "
            "would say nothing; lay some of them apart"
        )
    return training, validation


def _check_same(config: TrainConfig) -> None:
    """Refuses to go on with a run under other numbers: its checkpoints would bear a record of what they are not."""
    path = config.output / CONFIG
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        network = begun.pop("network")
        there = {**begun, **network}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{path}: can't be read ({exc}), and tells how the run was begun") from exc
    there = {**_BEFORE, **there}
    wanted = plain_values(config)
    wanted |= wanted.pop("network")
    # other fields that a later version brought are at their defaults, or the checkpoint tells
    differing = [name for name in sorted(there.keys() & wanted.keys() - _FREE) if there[name] != wanted[name]]
    if differing:
        words = ", ".join(f"{name} {there[name]} (now {wanted[name]})" for name in differing)
        raise ConfigError(f"{config.output}: the run was begun with {words}; --resume takes the same options again")
