"""From a checkpoint to files that runtimes read. Imports torch and onnx."""

from __future__ import annotations

from ddsm_deploy.export.bundle import write_bundle
from ddsm_deploy.export.onnx import ExportOptions, ExportReport, export_onnx

__all__ = ["ExportOptions", "ExportReport", "export_onnx", "write_bundle"]
