"""A checkpoint to a bundle: the folder that holds one model in every form, which `ddsm_deploy.artifact` reads.

`make_bundle`, which puts finished files together and needs no torch, lives in `ddsm_deploy.packing`.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from ddsm_deploy.artifact import BUNDLE_SUFFIX
from ddsm_deploy.errors import InputError
from ddsm_deploy.export.onnx import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.files import writing
from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.spec import sha256_of

__all__ = ["make_bundle", "write_bundle"]

CHECKPOINT = "model.safetensors"
ONNX = "model.onnx"


def write_bundle(
    checkpoint: str | Path, folder: str | Path, *, name: str, options: ExportOptions, overwrite: bool = False
) -> ExportReport:
    """Writes a model's checkpoint and its deployed ONNX into one folder, with ``bundle.json``.

    With ``options.weights == "fp16"`` the checkpoint is rewritten with float16 storage first (see `save_checkpoint`),
    and the ONNX file is made from that, so the two hold the same weights, and the bundle holds them once.

    Args:
        checkpoint: what to bundle.
        folder: made if it is not there; files of an earlier bundle in it are replaced.
        name: the model's name, in the bundle and in the spec of both files.
        options: of the export.
        overwrite: also where the bundle that is there has another checkpoint or further files, which are lost.

    Returns:
        Of the export. Size and sha256 are the self-contained file's: in the folder its weights lie beside it.

    Raises:
        InputError: the folder can't be written, is named like a zip, or something there would be lost.
        DdsmError: whatever `export_onnx` raises.
    """
    folder = Path(folder)
    network, spec = load_checkpoint(checkpoint)
    spec = spec.replace(name=name).with_provenance(trained_sha256=sha256_of(checkpoint))
    if folder.suffix.lower() == BUNDLE_SUFFIX:
        raise InputError(f"{folder}: expected a folder's name; `ddsm bundle` makes a zip of a folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        half, onnx = Path(temporary, CHECKPOINT), Path(temporary, ONNX)
        save_checkpoint(half, network, spec, half=options.weights == "fp16")
        report = export_onnx(half, onnx, options)
        bundle = make_bundle(folder, [onnx, half], name=name, overwrite=overwrite).bundle
    (file,) = (member.file for member in bundle.members if member.kind == "onnx")  # of another name in fp16
    return dataclasses.replace(report, path=folder / file)
