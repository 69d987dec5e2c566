"""The files of a run: the folder that it writes to, and the data that it reads. Imports no torch."""

from __future__ import annotations

from ddsm_deploy.datasets import Dataset, open_dataset
from ddsm_deploy.errors import ConfigError, InputError
from ddsm_deploy.train.config import TrainConfig

LAST = "last.ckpt"
BEST = "best.safetensors"
FINAL = "final.safetensors"


def open_run(config: TrainConfig) -> tuple[Dataset, Dataset]:
    """Makes the output folder, and finds the images to learn from and to validate on.

    Raises:
        ConfigError: the output folder holds another run, or there is none to resume; no such kind of data set.
        InputError: the folder can't be made, or the data can't be read.
    """
    last = config.output / LAST
    if config.resume and not last.is_file():
        raise ConfigError(f"{config.output}: nothing to resume (no {LAST})")
    if not config.resume and last.exists():
        raise ConfigError(f"{config.output}: holds a run already; go on with it by --resume, or name another folder")
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InputError(f"{config.output}: can't be made ({exc.strerror or exc})") from exc
    training = open_dataset(config.dataset, config.data, config.train_split)
    return training, open_dataset(config.dataset, config.data, config.val_split)
