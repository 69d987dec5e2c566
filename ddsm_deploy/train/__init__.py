"""Training: data sets with augmentation, losses, and the loop on Lightning. Imports torch."""

from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.loop import train

__all__ = ["TrainConfig", "train"]
