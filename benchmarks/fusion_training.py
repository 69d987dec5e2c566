"""A training step of DDSM against one of ``fusion="add"``: forward, losses, backward and optimizer, in torch.

Losses are the project's own (`ddsm_deploy.train`), with the defaults of a training run; bf16 by autocast, channels
last, eight random images of 360×480 with random labels, whose values change no time. Both sides live in one process,
which has one pool of threads, and take turns step by step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from fusion_support import SIDES, alternate, compare
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddsm_deploy.model.checkpoint import load_checkpoint
from ddsm_deploy.model.operator import dynamic_sample_attention
from ddsm_deploy.spec import ModelSpec
from ddsm_deploy.train.config import TrainConfig
from ddsm_deploy.train.module import SegmentationTask

SIZE = (360, 480)
BATCH = 8


class Steps(SegmentationTask):
    """The project's training module, stepped by hand."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Nobody reads it here."""


def measure(
    sides: dict[str, Path], *, threads: int, steps: int, batch: int = BATCH, size: tuple[int, int] = SIZE
) -> dict[str, Any]:
    """One row of the comparison.

    Args:
        sides: ``ddsm`` and ``add`` -> checkpoint.
        threads: of torch, in this whole process from now on.
        steps: timed ones a side.
        batch: images a step.
        size: rows and columns of an image.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8)
    runners = []
    for side in SIDES:
        network, spec = load_checkpoint(sides[side])
        labels = torch.randint(0, len(spec.classes), (batch, *size))
        runners.append(_Step(_task(network, spec), images, labels))
    times = alternate(runners, rounds=steps, block=1, settle=0)
    return {
        "kind": "training",
        "backend": "torch",
        "precision": "bf16",
        "size": f"{size[0]}x{size[1]}",
        "batch": batch,
        "threads": threads,
        "sampling": _sampling(),
        **compare(*times),
    }


def _task(network: torch.nn.Module, spec: ModelSpec) -> Steps:
    config = TrainConfig(data=Path(), output=Path(), network=spec.network, class_weights="none")
    task = Steps(network, spec, config, torch.ones(len(spec.classes)))
    return task.to(memory_format=torch.channels_last).train()


@dataclasses.dataclass
class _Step:
    """One training step, ready to be called."""

    task: Steps
    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.task.parameters(), lr=1e-5)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.task.training_step((self.images, self.labels), 0)
        loss.backward()
        self.optimizer.step()


class _Sampler(TorchDispatchMode):
    """Notes whether torch's own grid sampler was called, as in the operator's definition."""

    called = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called |= "grid_sampler" in str(function)
        return function(*args, **(kwargs or {}))


def _sampling() -> str:
    """What the operator runs on here: ``portable``, its definition in torch, or ``fused``, the kernel."""
    maps = torch.rand(4, 1, 18, 4, 4).bfloat16()
    with _Sampler() as seen, torch.no_grad():
        dynamic_sample_attention(*maps)
    return "portable" if seen.called else "fused"
