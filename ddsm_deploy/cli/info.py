"""`ddsm info`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from ddsm_deploy.artifact import Artifact
    from ddsm_deploy.engines import BackendStatus


def info(
    model: Annotated[
        str | None, typer.Argument(help="File, bundle folder or shipped name.", show_default="ddsm-lite0")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
    load: Annotated[
        bool, typer.Option("--load", help="Load every runtime, for what it can do on this machine; takes seconds.")
    ] = False,
) -> None:
    """Show a model's record, and which backends are usable here (and if not, what to install)."""
    import json
    import sys

    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.engines import usable_backends

    artifact = resolve(model)
    result = {
        "model": _model_record(artifact),
        "backends": [_backend_record(status, artifact, load=load) for status in usable_backends()],
    }
    _show(result, sys.stderr if json_file == "-" else sys.stdout)
    if json_file is not None:
        write_json(json_file, json.dumps(result, indent=2, ensure_ascii=False))


def _model_record(artifact: Artifact) -> dict[str, Any]:
    import dataclasses

    from ddsm_deploy.spec import sha256_of

    spec = artifact.spec
    return {
        "name": artifact.name,
        "size": [spec.height, spec.width],
        "channel_order": spec.channel_order,
        "precision": spec.precision,
        "classes": [
            {"id": index, "name": name, "color": list(color)}
            for index, (name, color) in enumerate(zip(spec.classes, spec.palette, strict=True))
        ],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "network": dataclasses.asdict(spec.network),
        "provenance": dict(sorted(spec.provenance.items())),
        "files": [
            {"kind": kind, "file": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for kind, path in artifact.files.items()
        ],
    }


def _backend_record(status: BackendStatus, artifact: Artifact, *, load: bool) -> dict[str, Any]:
    from ddsm_deploy.engines import FILE_KINDS, available_precisions
    from ddsm_deploy.errors import BackendError

    record: dict[str, Any] = {
        "backend": status.backend,
        "available": status.available,
        "version": status.version,
        "reason": status.reason,
        "runs_this_model": FILE_KINDS[status.backend] in artifact.files,
    }
    if load and status.available:
        try:
            record["precisions"] = list(available_precisions(status.backend))
        except BackendError as exc:
            record.update(available=False, reason=str(exc))
    return record


def _show(result: dict[str, Any], file: TextIO) -> None:
    model = result["model"]
    rows = {
        "model": model["name"],
        "size": f"{model['size'][0]}x{model['size'][1]} ({model['channel_order']})",
        "precision": model["precision"],
        "network": ", ".join(f"{key} {value}" for key, value in model["network"].items()),
        "classes": f"{len(model['classes'])}: " + ", ".join(entry["name"] for entry in model["classes"]),
    }
    for entry in model["files"]:
        rows[entry["kind"]] = f"{entry['file']} ({entry['bytes'] / 1e6:.1f} MB)"
        rows[f"{entry['kind']} sha256"] = entry["sha256"]
    _print_columns(rows, file)
    print("\nprovenance", file=file)
    _print_columns(model["provenance"], file)
    print("\nbackends", file=file)
    _print_columns({f"{row['backend']} {row['version']}".strip(): _state(row) for row in result["backends"]}, file)


def _print_columns(rows: dict[str, str], file: TextIO) -> None:
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        line = f"{key:<{width}}  {value}"
        # the texts come from the model file: no escape codes
        print("".join(c if c.isprintable() else "?" for c in line), file=file)


def _state(row: dict[str, Any]) -> str:
    if not row["available"]:
        return str(row["reason"])
    file = "" if row["runs_this_model"] else ", but the model has no file for it"
    precisions = f" ({', '.join(row['precisions'])})" if "precisions" in row else ""
    return f"usable{precisions}{file}"
