"""The deployed form of a network: bytes in, class ids out, everything between them inside.

`DeployModule` is what `ddsm_deploy.export` writes as a graph and what the torch engine runs, so that all backends
answer the same question.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ddsm_deploy.errors import ConfigError
from ddsm_deploy.spec import ModelSpec

OUTPUTS = ("mask", "logits", "confidence")
"""What a deployed model can give, in the order in which it gives them; ``mask`` is always there."""


class DeployModule(nn.Module):
    """Wraps an untouched network: channel order, normalisation, network, argmax.

    Args:
        network: normalised RGB image B×3×H×W -> logits B×classes×H×W; in evaluation mode.
        spec: gives `channel_order`, `mean` and `std`.
        outputs: further outputs beside ``mask``, any of `OUTPUTS`.

    Raises:
        ConfigError: an output that does not exist.
    """

    def __init__(self, network: nn.Module, spec: ModelSpec, *, outputs: Iterable[str] = ("mask",)) -> None:
        super().__init__()
        self.outputs = ordered_outputs(outputs)
        self.network = network
        self.swap = spec.channel_order == "bgr"
        self.register_buffer("order", torch.tensor([2, 1, 0]), persistent=False)
        self.register_buffer("mean", torch.tensor(spec.mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        scale = 1.0 / torch.tensor(spec.std, dtype=torch.float64)
        self.register_buffer("scale", scale.float().view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image uint8 N×H×W×3 in the spec's channel order -> the outputs, in the order of `OUTPUTS`.

        Returns:
            mask: uint8 N×H×W, class ids; logits: float32 N×K×H×W; confidence: uint8 N×H×W, the softmax probability of
            the chosen class, 255 = 1.
        """
        # TensorRT takes a uint8 input only if the very first node is a Cast, and no uint8 between the ends
        pixels = image.to(torch.float32).permute(0, 3, 1, 2)
        if self.swap:
            pixels = pixels.index_select(1, self.order)  # a plain Gather; indexing by a list exports as GatherND
        logits = self.network((pixels - self.mean) * self.scale)
        results = {"mask": logits.argmax(1).to(torch.uint8)}
        if "logits" in self.outputs:
            results["logits"] = logits.float()
        if "confidence" in self.outputs:
            best = logits.float().softmax(1).amax(1)
            results["confidence"] = (best * 255.0 + 0.5).to(torch.uint8)
        return tuple(results[name] for name in self.outputs)


def ordered_outputs(outputs: Iterable[str]) -> tuple[str, ...]:
    """`outputs` with ``mask``, each once, in the order of `OUTPUTS`.

    Raises:
        ConfigError: an output that does not exist.
    """
    wanted = {"mask", *outputs}
    unknown = sorted(wanted.difference(OUTPUTS))
    if unknown:
        raise ConfigError(f"output is {unknown[0]!r}; expected any of {', '.join(OUTPUTS)}")
    return tuple(name for name in OUTPUTS if name in wanted)
