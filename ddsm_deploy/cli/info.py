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
        "kernels": _kernels_record(load=load),
        "backends": [_backend_record(status, artifact, load=load) for status in usable_backends()],
        "decisions": _decisions(artifact),
    }
    _show(result, sys.stderr if json_file == "-" else sys.stdout)
    if json_file is not None:
        write_json(json_file, json.dumps(result, indent=2, ensure_ascii=False))


def _model_record(artifact: Artifact) -> dict[str, Any]:
    import dataclasses

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
        "files": [_file_record(part) for part in artifact.parts()],
    }


def _file_record(part: Artifact) -> dict[str, Any]:
    from ddsm_deploy.artifact import spec_of
    from ddsm_deploy.onnxfile import external_files
    from ddsm_deploy.onnxweights import model_sha256

    ((kind, path),) = part.files.items()
    own = spec_of(kind, path).provenance  # a part's record is the reference's, whichever of its files that is of
    record: dict[str, Any] = {
        "kind": kind,
        "precision": part.spec.precision,
        "target": part.target,
        "file": str(path),
        "bytes": path.stat().st_size,
        "sha256": model_sha256(path),
        "parity": {key: text for key, text in sorted(own.items()) if key.startswith("parity.")},
    }
    if kind == "onnx":
        record["weights"] = list(external_files(path))
    if kind == "engine":
        import json

        from ddsm_deploy.enginefile import read_record

        engine = json.loads(read_record(path).to_json())
        record["engine"] = {key: engine[key] for key in sorted(engine.keys() - {"spec", "sha256", "bytes"})}
    return record


def _decisions(artifact: Artifact) -> list[dict[str, Any]]:
    """What ``auto`` goes by on this machine: one opened plainly, one for batches, each as it is kept."""
    import json

    from ddsm_deploy.runtime.decisions import kept_for, place_of

    return [
        {"kept_in": str(place_of(decision.facts)), "text": decision.text(now=False), **json.loads(decision.to_json())}
        for decision in kept_for(artifact)
    ]


def _kernels_record(*, load: bool) -> dict[str, Any]:
    """The fused CPU kernels of dynamic sampling, and why OpenVINO's threads can't be lent to them, if so."""
    import contextlib

    from ddsm_deploy import kernels
    from ddsm_deploy.errors import BackendError

    status = kernels.status()
    record = {
        "available": status.available,
        "file": None if status.path is None else str(status.path),
        "instruction_sets": list(status.instruction_sets),
        "reason": status.reason,
        "openvino_threads": "",
    }
    try:
        kernels.pool_path()
    except BackendError as exc:
        record["openvino_threads"] = str(exc)
    if load and status.available:
        with contextlib.suppress(ImportError):  # OpenVINO is not installed
            from ddsm_deploy.engines.openvino_op import pool_problem

            record["openvino_threads"] = pool_problem()
    return record


def _backend_record(status: BackendStatus, artifact: Artifact, *, load: bool) -> dict[str, Any]:
    from ddsm_deploy.engines import available_precisions, possible_precisions, samples
    from ddsm_deploy.errors import BackendError

    record: dict[str, Any] = {
        "backend": status.backend,
        "available": status.available,
        "version": status.version,
        "reason": status.reason,
        "runs_this_model": bool(possible_precisions(artifact, status.backend)),
    }
    if record["runs_this_model"]:
        record["sampling"], record["sampling_note"] = samples(status.backend, artifact)
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
    _print_columns(rows, file)
    for entry in model["files"]:
        _show_file(entry, file)
    print("\nprovenance", file=file)
    _print_columns(model["provenance"], file)
    print("\nbackends", file=file)
    states = {f"{row['backend']} {row['version']}".strip(): _state(row) for row in result["backends"]}
    _print_columns({**states, "fused sampling": _kernels_state(result["kernels"])}, file)
    for decision in result["decisions"]:
        _show_decision(decision, file)


def _show_file(entry: dict[str, Any], file: TextIO) -> None:
    from ddsm_deploy.bundlefile import describe

    print(file=file)
    shared = f", weights in {', '.join(entry['weights'])}" if entry.get("weights") else ""
    rows = {
        describe(
            entry["kind"], entry["precision"], entry["target"]
        ): f"{entry['file']} ({entry['bytes'] / 1e6:.1f} MB{shared})",
        "  sha256": entry["sha256"],
    }
    rows |= {f"  {key}": text for key, text in entry["parity"].items()}
    rows |= {f"  {key}": _text(value) for key, value in entry.get("engine", {}).items() if value}
    _print_columns(rows, file)


def _show_decision(decision: dict[str, Any], file: TextIO) -> None:
    from ddsm_deploy.engines import in_words

    facts = decision["facts"]
    asked = {key: value for key, value in facts["options"].items() if value is not None and value != "cpu"}
    for_what = f"for {facts['goal']}" + (f" with {_text(asked)}" if asked else "")
    how = "tuned" if decision["tuned"] else "measured"
    print(f"\nauto {for_what}, {how} {decision['measured']} on {decision['frames']}", file=file)
    rows = {}
    for trial in decision["trials"]:
        options = f" {_text(trial['options'])}" if trial["options"] else ""
        figures = [] if trial["ms"] is None else [f"{trial['ms']:.1f} ms"]
        if trial["changed"] is not None:
            figures.append(f"{trial['changed']:.2f} % changed of {trial['allowed']:.2f} allowed")
        rows[f"{in_words(trial['backend'], trial['precision'], trial['sampling'])}{options}"] = ", ".join(
            [*figures, trial["verdict"], *([trial["reason"]] if trial["reason"] else [])]
        )
    if decision["reference"]:
        rows["compared with"] = f"{decision['reference']}; noise alone changes {decision['noise']:.2f} % of its pixels"
    rows |= {f"not tried {index}": text for index, text in enumerate(decision["others"], start=1)}
    rows["kept in"] = decision["kept_in"]
    _print_columns(rows, file)


def _text(value: Any) -> str:
    """Plain values on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_text(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return str(value)


def _print_columns(rows: dict[str, str], file: TextIO) -> None:
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        line = f"{key:<{width}}  {value}"
        # the texts come from the model file: no escape codes
        print("".join(c if c.isprintable() else "?" for c in line), file=file)


def _state(row: dict[str, Any]) -> str:
    if not row["available"]:
        return str(row["reason"])
    precisions = f" ({', '.join(row['precisions'])})" if "precisions" in row else ""
    if not row["runs_this_model"]:
        return f"usable{precisions}, but the model has no file for it"
    note = f" ({row['sampling_note']})" if row["sampling_note"] else ""
    return f"usable{precisions}, samples {row['sampling']}{note}"


def _kernels_state(row: dict[str, Any]) -> str:
    if not row["available"]:
        return str(row["reason"])
    alone = f"; in OpenVINO on one thread of each inference ({row['openvino_threads']})"
    return f"usable ({', '.join(row['instruction_sets'])}){alone if row['openvino_threads'] else ''}"
