"""Several calls of the sampling operator as one ONNX file, for tests of its forms."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ddsm_deploy.export.sampling import translation_table
from ddsm_deploy.model.operator import dynamic_sample_attention


class Calls(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(dynamic_sample_attention(*tensors[i : i + 4]) for i in range(0, len(tensors), 4))


def inputs(case: tuple[int, int, int, int, int, int, float]) -> list[Tensor]:
    b, k, v, n, y, x, spread = case
    generator = torch.Generator().manual_seed(1000 * n + 10 * y + x)
    shapes = [(b, k, y, x), (b, k, y, x), (b, v, y, x), (b, 2 * n, y, x)]
    query, key, value, offset = (torch.randn(s, generator=generator) for s in shapes)
    return [query, key, value, offset * spread]


def export(sampling: str, cases: list[tuple[int, int, int, int, int, int, float]], *, axes: tuple[int, ...]) -> bytes:
    tensors = [tensor for case in cases for tensor in inputs(case)]
    shapes = (tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in tensors),) if axes else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            Calls().eval(),
            tuple(tensors),
            dynamo=True,
            opset_version=19,
            input_names=[f"in{i}" for i in range(len(tensors))],
            dynamic_shapes=shapes,
            custom_translation_table=translation_table(sampling),
            verbose=False,
        )
    return program.model_proto.SerializeToString()
