"""PyTorch: the checkpoint itself, eagerly, on the CPU. The reference for all other engines, and the slowest."""

from __future__ import annotations

import numpy as np
import torch

from ddsm_deploy import kernels
from ddsm_deploy.artifact import Artifact
from ddsm_deploy.engines.base import Array, BaseEngine, EngineOptions, TensorInfo
from ddsm_deploy.errors import BackendError
from ddsm_deploy.model.checkpoint import load_checkpoint
from ddsm_deploy.model.deploy import DeployModule

_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is Arm's


class TorchEngine(BaseEngine):
    """Takes any batch of images of the spec's size.

    fp16 and bf16 are torch's autocast, which keeps softmax and what else is delicate in float32. fp16 shows what
    rounding to float16 does to the masks; on CPUs it is several times slower than fp32.

    `threads` is `torch.set_num_threads`, which counts for the whole process.
    """

    backend = "torch"

    def __init__(self, artifact: Artifact, options: EngineOptions) -> None:
        options.only(self.backend)
        self.precision = options.precision or "fp32"
        if self.precision not in ("fp32", "bf16", "fp16"):
            raise BackendError(f"torch runs fp32, bf16 and fp16, not {self.precision}")
        if self.precision not in self.precisions():
            raise BackendError(
                "bf16 on torch needs a CPU with AVX512-BF16, AMX-BF16 or Arm BF16, which this one lacks; use fp32"
            )
        self.sampling = _sampling(self.precision, options)
        network, _ = load_checkpoint(artifact.file("checkpoint"))
        spec = artifact.spec
        self._module: DeployModule | None = DeployModule(network, spec, outputs=options.outputs or ("mask",)).eval()
        if options.threads is not None:
            torch.set_num_threads(options.threads)

        size = (spec.height, spec.width)
        shapes = {"mask": (None, *size), "logits": (None, len(spec.classes), *size), "confidence": (None, *size)}
        self.inputs = (TensorInfo(name="image", dtype=np.dtype(np.uint8), shape=(None, *size, 3)),)
        self.outputs = tuple(
            TensorInfo(name=name, dtype=np.dtype(np.float32 if name == "logits" else np.uint8), shape=shapes[name])
            for name in self._module.outputs
        )

    @classmethod
    def precisions(cls) -> tuple[str, ...]:
        """See `BaseEngine.precisions`."""
        capabilities = torch.cpu.get_capabilities()
        return ("fp32", *["bf16"] * any(capabilities.get(flag) for flag in _BF16_FLAGS), "fp16")

    def _infer(self, feeds: dict[str, Array]) -> dict[str, Array]:
        module = self._module
        if module is None:  # closed by another thread a moment ago
            raise self._closed_error()
        image = torch.from_numpy(np.require(feeds["image"], requirements="W"))  # torch wants to be able to write
        try:
            with torch.inference_mode(), _autocast(self.precision):
                results = module(image)
        except RuntimeError as exc:
            raise BackendError(f"torch failed: {str(exc).splitlines()[0]}") from exc
        return {info.name: tensor.numpy() for info, tensor in zip(self.outputs, results, strict=True)}

    def _release(self) -> None:
        self._module = None


def _sampling(precision: str, options: EngineOptions) -> str:
    """How torch samples, which the operator decides by itself: on the kernels where there are any for the type."""
    problem = kernels.problem(precision)
    runs = "portable" if problem else "fused"
    if options.sampling not in (None, runs):
        raise BackendError(f"torch samples {runs} here, not {options.sampling}{f' ({problem})' if problem else ''}")
    return runs


def _autocast(precision: str) -> torch.autocast:
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast("cpu", kind, enabled=precision != "fp32")
