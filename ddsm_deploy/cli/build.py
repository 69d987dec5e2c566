"""`ddsm build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ddsm_deploy.optimize.build import BuildReport


def build(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    target: Annotated[str, typer.Option(help="tensorrt, or tensorrt-rtx, which builds without a GPU.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The engine to write.", show_default="MODEL.PRECISION.TARGET.engine"),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8 or int8+fp16; else the model's own.")] = None,
    sampling: Annotated[
        str, typer.Option(help="portable, or fused: tensorrt only, our kernel as a plugin, experimental.")
    ] = "portable",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="tensorrt-rtx: of the GPUs, as 86; repeatable.", show_default="80, 86, 89, 120"),
    ] = None,
    workspace: Annotated[float | None, typer.Option(help="Most scratch memory of a layer, GiB.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="MIN:OPT:MAX, each NxHxW: sizes of a model with open axes.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="tensorrt: file of measured times, read and written.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="tensorrt: later versions run the engine too.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: all GPUs from Ampere on run the engine.")
    ] = False,
    dla_core: Annotated[
        int | None, typer.Option(help="tensorrt up to 10.7 or from 11.4.1: a Jetson's DLA; fp16 and int8 only.")
    ] = None,
    builder_optimization_level: Annotated[
        int | None, typer.Option(help="tensorrt: 0 (quick build) to 5 (quick engine).")
    ] = None,
    verify_images: Annotated[
        list[Path] | None, typer.Option(help="Image or folder to compare with float32 on; else synthetic images.")
    ] = None,
    max_changed: Annotated[
        float | None, typer.Option(help="Most per cent of the pixels that may change class.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the comparison with float32.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write the engine even if the comparison fails.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Builds a TensorRT engine with a record beside it, after a comparison of its graph with the float32 one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from ddsm_deploy.cli.render import check_json, require, write_json

    with require(target, backend="ddsm build"):
        from ddsm_deploy.artifact import resolve
        from ddsm_deploy.enginefile import record_path
        from ddsm_deploy.errors import InputError
        from ddsm_deploy.optimize.build import BuildOptions, build_engine
        from ddsm_deploy.optimize.buildoptions import engine_name, parse_profile

    options = BuildOptions(
        target=target,
        precision=precision,
        sampling=sampling,
        compute_capabilities=tuple(compute_capability or ()),
        workspace=workspace,
        profile=None if profile is None else parse_profile(profile),
        timing_cache=timing_cache,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        dla_core=dla_core,
        builder_optimization_level=builder_optimization_level,
        verify=not no_verify,
        images=tuple(verify_images or ()),
        max_changed=max_changed,
        force=force,
    )
    if output is None:
        output = Path(engine_name(resolve(model), options))
    if json_file is not None and Path(json_file).absolute() in (output.absolute(), record_path(output).absolute()):
        raise InputError(f"{json_file}: is the engine's own; expected another file for --json")
    check_json(json_file)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        report = build_engine(
            model,
            output,
            options,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )
    typer.echo(_summary(report), err=json_file == "-")
    if json_file is not None:
        write_json(json_file, _json(report))


def _summary(report: BuildReport) -> str:
    record = report.record
    counts = (f"{count} {op} {dtype}" for op, types in record.layers.items() for dtype, count in types.items())
    sizes = ", ".join(f"{name} {sizes}" for name, sizes in record.profiles.items())
    where = ", ".join(record.compute_capabilities) or "this GPU"
    text = (
        f"{report.path}: {record.bytes / 1e6:.1f} MB, {record.target} {record.version}, {record.spec.precision}, "
        f"sampling {record.sampling}, "
        f"compute capability {where}{f', {sizes}' if sizes else ''}; {', '.join(counts) or 'layers not known'}; "
        f"made in {report.seconds:.0f} s. Graph: {record.parity['graph']}"
    )
    if report.parity is not None:
        text += f", on {report.parity.images} images {report.parity.changed:.2f} % of the pixels differ"
        text += "" if report.parity else f" (TOO FAR, written by force: {'; '.join(report.parity.failures)})"
    text += f". Engine: {record.parity['engine']}"
    if report.engine_parity is not None:
        text += f", {report.engine_parity.changed:.2f} % of the pixels differ"
    return "\n".join([f"{text}.", *(f"note: {note}" for note in record.notes)])


def _json(report: BuildReport) -> str:
    import json

    fields = {
        "path": str(report.path),
        "record": json.loads(report.record.to_json()),
        "parity": None if report.parity is None else report.parity.fields(),
        "engine_parity": None if report.engine_parity is None else report.engine_parity.fields(),
        "seconds": report.seconds,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False)
