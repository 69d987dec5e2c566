"""Options that several commands have, each declared once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help=".onnx, .safetensors, .engine, bundle (folder or .zip), triton://HOST/MODEL, or a shipped model's name.",
    ),
]
Backend = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, torch, tensorrt, tensorrt-rtx or triton.")]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16, int8...; with auto the quickest, else the model's own.")
]
Sampling = Annotated[
    str | None, typer.Option(help="Of fused files: fused or portable; else fused where it can be had.")
]
Provider = Annotated[str, typer.Option(help="Of onnxruntime: cpu, cuda or tensorrt.")]
Fit = Annotated[str, typer.Option(help="Bring images to the network's size: stretch or letterbox.")]
