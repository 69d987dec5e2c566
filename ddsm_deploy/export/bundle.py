"""A checkpoint to a bundle: the folder that holds one model in every form, which `ddsm_deploy.artifact` reads.

`make_bundle`, which puts finished files together and needs no torch, lives in `ddsm_deploy.packing`.
"""

from __future__ import annotations

from pathlib import Path

from ddsm_deploy.bundlefile import BUNDLE_FILE, Bundle, Member
from ddsm_deploy.export.onnx import ExportOptions, ExportReport, export_onnx
from ddsm_deploy.files import replacing, writing
from ddsm_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from ddsm_deploy.packing import make_bundle
from ddsm_deploy.spec import sha256_of

__all__ = ["make_bundle", "write_bundle"]

CHECKPOINT = "model.safetensors"
ONNX = "model.onnx"


def write_bundle(checkpoint: str | Path, folder: str | Path, *, name: str, options: ExportOptions) -> ExportReport:
    """Writes a model's checkpoint and its deployed ONNX into one folder, with ``bundle.json``.

    With ``options.weights == "fp16"`` the checkpoint is rewritten with float16 storage first (see `save_checkpoint`),
    and the ONNX file is made from that, so the two hold the same weights. ``bundle.json`` is written last: a folder
    without it is no bundle.

    Args:
        checkpoint: what to bundle.
        folder: made if it is not there; files of an earlier bundle in it are replaced.
        name: the model's name, in the bundle and in the spec of both files.
        options: of the export.

    Raises:
        InputError: the folder can't be written.
        DdsmError: whatever `export_onnx` raises.
    """
    folder = Path(folder)
    network, spec = load_checkpoint(checkpoint)
    spec = spec.replace(name=name).with_provenance(trained_sha256=sha256_of(checkpoint))
    record = folder / BUNDLE_FILE
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
    save_checkpoint(folder / CHECKPOINT, network, spec, half=options.weights == "fp16")
    report = export_onnx(folder / CHECKPOINT, folder / ONNX, options)
    members = tuple(
        Member(file=file, kind=kind, precision="fp32", sha256=sha256_of(folder / file))
        for kind, file in (("onnx", ONNX), ("checkpoint", CHECKPOINT))
    )
    with replacing(record) as temporary, writing(record):
        temporary.write_text(Bundle(name=name, members=members).to_json(), encoding="utf-8")
    return report
