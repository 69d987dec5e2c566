"""`ddsm bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.benchmark import BenchResult, Row

_FIGURES = (  # heading, key of Row.fields(), digits
    ("p50", "p50_ms", 1),
    ("p95", "p95_ms", 1),
    ("p99", "p99_ms", 1),
    ("max", "max_ms", 1),
    ("infer", "infer_p50_ms", 1),
    ("FPS", "fps", 1),
    ("load", "load_ms", 0),
    ("first", "first_ms", 0),
    ("peak", "peak_mb", 0),
)


def bench(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, checkpoint, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch, onnxruntime, openvino, tensorrt…; repeatable.")
    ] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16, int8…; repeatable.")] = None,
    sampling: Annotated[
        list[str] | None, typer.Option(help="Of fused files: fused, portable; repeatable; else fused if possible.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    runs: Annotated[int, typer.Option(help="Timed runs on each backend.")] = 100,
    seconds: Annotated[float, typer.Option(help="Time limit of each backend's timed runs.")] = 60.0,
    warm_up: Annotated[int, typer.Option(help="Untimed runs before them.")] = 10,
    images: Annotated[Path | None, typer.Option(help="Folder of images to run on; noise if left out.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Times a model on the backends that are installed, one image at a time, from image to mask.

    Without --backend and --precision, all that may run are tried, and those that can't run here say why.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.errors import BackendError
    from ddsm_deploy.evaluate.benchmark import BenchOptions
    from ddsm_deploy.evaluate.benchmark import bench as run

    options = BenchOptions(
        backends=tuple(backend or ()),
        precisions=tuple(precision or ()),
        samplings=tuple(sampling or ()),
        threads=threads,
        runs=runs,
        seconds=seconds,
        warm_up=warm_up,
        images=images,
    )
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=runs)
        result = run(
            model,
            options,
            progress=lambda text, done, planned: bar.update(task, description=text, completed=done, total=planned),
        )
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json())
    if all(row.error for row in result.rows):
        raise BackendError("no backend could run this model; the reasons are above")


def _show(result: BenchResult, console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("")  # the only one that wraps where the terminal is narrow
    for heading, _, _ in _FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result.rows:
        if not row.error:
            fields = row.fields()
            table.add_row(_label(row), *(_figure(fields[key], digits) for _, key, digits in _FIGURES))

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    machine = result.machine
    load = f", load {machine['load_average'][0]:.1f} at the start" if machine["load_average"] else ""
    line(f"{result.model}, {result.size[0]}x{result.size[1]}, batch 1, {result.images}")
    line(f"{machine['cpu']}, {machine['cores_usable']} cores{load}")
    if table.rows:
        console.print(table)
        line("times in ms from image to mask (infer: the network alone); peak memory in MB; no run left out")
    for row in result.rows:
        if row.error:
            line(f"{_label(row)}: {row.error}")


def _label(row: Row) -> str:
    return " ".join(word for word in (row.backend, row.precision, row.sampling) if word)


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
