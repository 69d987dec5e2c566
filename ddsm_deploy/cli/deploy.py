"""`ddsm deploy`: one command a place to which models go."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ddsm_deploy.export.triton.repository import TritonReport

app = typer.Typer(help="Write a model as a server or another system takes it.", no_args_is_help=True)


@app.callback()
def _deploy() -> None:
    """Makes `deploy` a group however few commands it has."""


@app.command("triton")
def triton(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, engine, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    repository: Annotated[Path, typer.Option("-o", "--output", help="The model repository, a folder.")],
    platform: Annotated[str, typer.Option(help="Triton's backend: onnxruntime, or tensorrt (an engine).")] = (
        "onnxruntime"
    ),
    name: Annotated[str | None, typer.Option(help="Of the model on the server; else its own.")] = None,
    max_batch: Annotated[int, typer.Option(help="Most images of one inference, where the model's batch is open.")] = 8,
    batch_delay_us: Annotated[int, typer.Option(help="How long a request waits for others, microseconds.")] = 2000,
    instances: Annotated[int, typer.Option(help="Of the model on each device.")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu or gpu.", show_default="cpu; gpu for tensorrt")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or int8; else the model's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="On the CPU: threads of one inference; else all cores.")] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="onnxruntime on the GPU: tensorrt, ONNX Runtime's TensorRT provider.")
    ] = None,
    new_version: Annotated[bool, typer.Option("--new-version", help="Add a version to a model that is there.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Writes a model into a model repository of Triton Inference Server: config.pbtxt and the model's file.

    Segment against the running server with: ddsm segment SOURCE -o DIR -m triton://HOST/NAME
    """
    from ddsm_deploy.cli.render import require, write_json

    with require("triton", backend="ddsm deploy triton"):
        from ddsm_deploy.export.triton.config import TritonOptions
        from ddsm_deploy.export.triton.repository import deploy

    options = TritonOptions(
        platform=platform,
        name=name,
        max_batch=max_batch,
        batch_delay_us=batch_delay_us,
        instances=instances,
        device=device,
        precision=precision,
        threads=threads,
        accelerator=accelerator,
        overwrite=overwrite,
        new_version=new_version,
    )
    report = deploy(model, repository, options)
    typer.echo(_summary(report), err=json_file == "-")
    if json_file is not None:
        write_json(json_file, _json(report))


def _summary(report: TritonReport) -> str:
    spec = report.spec
    batch = f"batches of up to {report.max_batch}" if report.max_batch else "one image a time"
    text = (
        f"{report.file}: {spec.precision} on {report.platform}, {report.device}, {spec.height}x{spec.width} "
        f"{spec.channel_order}, {batch}, {report.instances} instance{'s' * (report.instances > 1)} a device; "
        f"model {report.name}, version {report.version}"
    )
    return "\n".join([text, *(f"note: {note}" for note in report.notes)])


def _json(report: TritonReport) -> str:
    import json

    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    fields |= {"folder": str(report.folder), "file": str(report.file), "spec": json.loads(report.spec.to_json())}
    return json.dumps(fields, indent=2, ensure_ascii=False)
