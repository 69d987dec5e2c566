"""From a checkpoint to files that runtimes read.

The names below load on first use, for they import torch; what works on ONNX files alone (`fp16`, `tensorrt`) does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddsm_deploy.export.bundle import write_bundle
    from ddsm_deploy.export.onnx import ExportOptions, ExportReport, export_onnx

__all__ = ["ExportOptions", "ExportReport", "export_onnx", "write_bundle"]

_HOMES = {"ExportOptions": "onnx", "ExportReport": "onnx", "export_onnx": "onnx", "write_bundle": "bundle"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
