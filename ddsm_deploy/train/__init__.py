"""Training: data sets with augmentation, losses, and the loop on Lightning.

Importing this loads no torch; `train` does, once the configuration, the folders and the data have been found right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.files import open_run

if TYPE_CHECKING:
    from ddsm_deploy.train.loop import TrainResult

__all__ = ["TrainConfig", "train"]


def train(config: TrainConfig, progress: Callable[[str], None] = lambda text: None) -> TrainResult:
    """Runs one training, or goes on with one that was stopped.

    Args:
        config: what to train, on what, for how long.
        progress: told, in a line, what of `TrainConfig.init` could not be used, and why no fused kernels are in use.

    Raises:
        ConfigError: the output folder holds another run, or there is none to resume.
        ArtifactError: the checkpoint to start from can't be read, or has another backbone.
        InputError: the data can't be read.
        KeyboardInterrupt: stopped by Ctrl-C, between two batches (by a second one at once); the last whole epoch is
            kept, and `resume` goes on from it.
    """
    training, validation = open_run(config)
    from ddsm_deploy.train.loop import fit

    return fit(config, training, validation, progress)
