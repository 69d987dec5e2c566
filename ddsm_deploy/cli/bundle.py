"""`ddsm bundle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def bundle(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder or .zip to write; or .onnx, for one ONNX file alone.")
    ],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Checkpoint, ONNX files, engines (their record lies beside them), bundles or shipped names.",
        ),
    ],
    *,
    name: Annotated[str | None, typer.Option(help="Of the model; else OUTPUT's own.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also where something in OUTPUT is lost by it.")
    ] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Put the files of one model, at every precision and for every backend, into one bundle, each weight once."""
    import json

    from ddsm_deploy.bundlefile import KINDS, describe
    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.packing import make_bundle, write_whole

    if output.suffix.lower() == KINDS["onnx"]:
        if len(files) != 1:
            raise typer.BadParameter(f"{len(files)} files for {output}; expected one ONNX file", param_hint="FILE")
        size = write_whole(output, files[0])
        typer.echo(f"{output}: {size / 1e6:.1f} MB, self-contained", err=json_file == "-")
        if json_file is not None:
            write_json(json_file, json.dumps({"path": str(output), "bytes": size}, indent=2, ensure_ascii=False))
        return
    report = make_bundle(output, files, name=name, overwrite=overwrite)
    members = report.bundle.members
    typer.echo(f"{report.path}: {report.bundle.name}, {report.bytes / 1e6:.1f} MB", err=json_file == "-")
    width = max(len(member.file) for member in members)
    for member in members:
        typer.echo(f"  {member.file:<{width}}  {describe(*member.key)}", err=json_file == "-")
    if json_file is not None:
        fields = {"path": str(report.path), "bytes": report.bytes, **json.loads(report.bundle.to_json())}
        write_json(json_file, json.dumps(fields, indent=2, ensure_ascii=False))
