"""`ddsm export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ddsm_deploy.export import ExportReport


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Checkpoint (.safetensors), bundle folder or shipped name.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The ONNX file to write.")],
    *,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH of the input; else the checkpoint's.")] = None,
    dynamic: Annotated[str, typer.Option(help="Axes left open: none, batch, or batch,size (slow to export).")] = "none",
    sampling: Annotated[
        str,
        typer.Option(help="portable (GridSample), fused (our own node, with GridSample as its body), or gather."),
    ] = "portable",
    logits: Annotated[bool, typer.Option("--logits", help="Give the logits too, float32 N×K×H×W.")] = False,
    confidence: Annotated[bool, typer.Option("--confidence", help="Give the confidence too, uint8 N×H×W.")] = False,
    channel_order: Annotated[str, typer.Option(help="Of the input's three channels: bgr or rgb.")] = "bgr",
    precision: Annotated[str, typer.Option(help="Of the graph's arithmetic: fp32, or fp16 for GPUs.")] = "fp32",
    grid: Annotated[str, typer.Option(help="GridSample's type in an fp16 graph: fp32 or fp16.")] = "fp32",
    weights: Annotated[str, typer.Option(help="Storage of the weights: fp32, or fp16 where they are exact.")] = "fp32",
    verify_images: Annotated[
        list[Path] | None, typer.Option(help="Image or folder to compare with torch on; else synthetic images.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip running the file beside torch.")] = False,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Write a bundle: OUTPUT is a folder and gets checkpoint and ONNX.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --bundle: also where something in OUTPUT is lost.")
    ] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Writes a checkpoint as an ONNX file with pre- and post-processing inside, and compares it with torch."""
    from ddsm_deploy.cli.render import check_json, require, write_json
    from ddsm_deploy.spec import parse_size

    with require("train"):
        from ddsm_deploy.artifact import resolve
        from ddsm_deploy.errors import ConfigError
        from ddsm_deploy.export import ExportOptions, export_onnx, write_bundle

    options = ExportOptions(
        size=parse_size(size) if size is not None else None,
        dynamic=dynamic,
        sampling=sampling,
        outputs=("mask", *["logits"] * logits, *["confidence"] * confidence),
        channel_order=channel_order,
        precision=precision,
        grid=grid,
        weights=weights,
        verify=not no_verify,
        images=tuple(verify_images or ()),
    )
    source = resolve(checkpoint).file("checkpoint")
    if overwrite and not bundle:
        raise ConfigError("--overwrite goes with --bundle alone")
    check_json(json_file)
    if bundle:
        report = write_bundle(source, output, name=output.resolve().name, options=options, overwrite=overwrite)
    else:
        report = export_onnx(source, output, options)
    typer.echo(_summary(report), err=json_file == "-")
    if json_file is not None:
        write_json(json_file, _json(report))


def _summary(report: ExportReport) -> str:
    spec, parity = report.spec, report.parity
    facts = spec.provenance
    axes = {"none": "static", "batch": "any batch", "batch,size": "any batch and size"}[facts["dynamic"]]
    text = (
        f"{report.path}: {report.bytes / 1e6:.1f} MB, input {spec.height}x{spec.width} {spec.channel_order} ({axes}), "
        f"opset {facts['opset']}, {facts['sampling']} sampling, {spec.precision}, {facts['weights']} weights; "
        f"made in {report.seconds:.0f} s."
    )
    if parity is None:
        return f"{text} Not compared with torch."
    text += f" On {parity.images} images {100 - parity.changed:.4f} % of the pixels equal torch's"
    if parity.max_logit_error is not None:
        text += f", logits within {parity.max_logit_error:.1e}"
    return f"{text}."


def _json(report: ExportReport) -> str:
    import json

    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    fields |= {"path": str(report.path), "spec": json.loads(report.spec.to_json())}
    fields["parity"] = None if report.parity is None else report.parity.fields()
    return json.dumps(fields, indent=2, ensure_ascii=False)
