"""`ddsm eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.accuracy import EvalResult
    from ddsm_deploy.evaluate.table import Table


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Argument(help="ONNX files, checkpoints, bundles or shipped models.", show_default="ddsm-lite0"),
    ] = None,
    *,
    data: Annotated[Path, typer.Option(help="Root folder of the data set.")],
    dataset: Annotated[str, typer.Option(help="Layout of the data: camvid, cityscapes or folder.")] = "camvid",
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "val",
    backend: Annotated[
        list[str] | None, typer.Option(help="auto, torch, onnxruntime, openvino…; repeatable.", show_default="auto")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16…; repeatable; the model's own if left out.")
    ] = None,
    sampling: Annotated[
        list[str] | None, typer.Option(help="Of fused files: fused, portable; repeatable; else fused if possible.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every file of the model on every backend, at all it can run.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    boundary_tolerance: Annotated[int, typer.Option(help="Of the boundary F-score, in pixels of the labels.")] = 3,
    min_miou: Annotated[float | None, typer.Option(help="Exit with 3 where a mIoU (0 to 100) is below this.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(metavar="PTS", help="Exit with 3 where a mIoU is so many points below the first row's."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Scores a model's masks on a labelled data set: mIoU, pixel accuracy, boundary F-score.

    Several models, backends or precisions, or --all, give one table, with the difference to its first row.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ddsm_deploy.cli.render import check_json, write_json
    from ddsm_deploy.datasets import open_dataset
    from ddsm_deploy.errors import BackendError, GateError
    from ddsm_deploy.evaluate.table import TableOptions, score_all

    options = TableOptions(
        backends=tuple(backend or ()),
        precisions=tuple(precision or ()),
        samplings=tuple(sampling or ()),
        everything=everything,
        threads=threads,
        boundary_tolerance=boundary_tolerance,
    )
    samples = open_dataset(dataset, data, split)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    check_json(json_file)
    screen = Console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=len(samples.samples))
        table = score_all(
            model or [None],
            samples,
            options,
            progress=lambda text, done, total: bar.update(task, description=text, completed=done, total=total),
        )
    console = Console(stderr=json_file == "-")
    if len(table.rows) > 1:
        _show_table(table, console)
    elif table.rows[0].result is not None:
        _show(table.rows[0].result, console)
    errors = table.errors()
    if json_file is not None and (len(table.rows) > 1 or not errors):
        write_json(json_file, table.to_json())
    if table.interrupted:
        raise KeyboardInterrupt
    if errors:
        raise BackendError("; ".join(errors))
    if failures := table.failures(min_miou=min_miou, max_drop=max_drop):
        raise GateError("; ".join(failures))


def _show_table(table: Table, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table as Drawn

    scored = [row for row in table.rows if row.result is not None]
    if scored and (first := scored[0].result) is not None:
        facts = f"{first.images} images; scores in %, edge F: of boundaries within {first.boundary_tolerance_px} px"
        _line(console, f"{first.model} on {first.dataset} {first.split}: {facts}")
        drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
        for heading in ("file", "written in"):  # the two that wrap where the terminal is narrow
            drawn.add_column(heading, overflow="fold", min_width=10)
        for heading in ("backend", "runs at"):
            drawn.add_column(heading, no_wrap=True)
        for heading in ("mIoU", "Δ", "pixels", "edge F"):
            drawn.add_column(heading, justify="right", no_wrap=True)
        for row in scored:
            if (result := row.result) is not None:
                names = [escape(row.file), row.written, *result.label.split(" ", 1)]
                delta = "–" if row is scored[0] else f"{round(-(row.drop or 0.0), 2) + 0.0:+.2f}"  # + 0.0: no -0.00
                scores = [_percent(v) for v in (result.miou, result.pixel_accuracy, result.boundary_f)]
                drawn.add_row(*names, scores[0], delta, *scores[1:])
        console.print(drawn)
    for row in table.rows:
        if row.error:
            asked = " ".join(word for word in (row.task.backend, row.task.precision, row.task.sampling) if word)
            _line(console, f"not run: {row.file} on {asked}: {row.error}")


def _show(result: EvalResult, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_footer=True)
    table.add_column("class", footer="mean")
    table.add_column("IoU %", justify="right", footer=_percent(result.miou))
    heading = f"boundary F % ({result.boundary_tolerance_px} px)"
    table.add_column(heading, justify="right", footer=_percent(result.boundary_f))
    for name, iou in result.per_class.items():
        table.add_row(escape(name), _percent(iou), _percent(result.boundary_f_per_class[name]))

    head = f"{result.model} on {result.dataset} {result.split}: {result.images} images; {result.choice}"
    _line(console, head)
    console.print(table)
    _line(console, f"mIoU {_percent(result.miou)} %, pixel accuracy {_percent(result.pixel_accuracy)} %")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"  # NaN: the class does not appear
