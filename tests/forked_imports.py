"""What `forked` imports once, in the process that it forks."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, while PyTorch loads

import torch.utils.tensorboard  # noqa: F401

import ddsm_deploy.cli
import ddsm_deploy.train.loop  # noqa: F401
