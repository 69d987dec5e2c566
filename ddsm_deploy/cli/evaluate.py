"""`ddsm eval`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.accuracy import EvalResult


def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, checkpoint, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    data: Annotated[Path, typer.Option(help="Root folder of the data set.")],
    dataset: Annotated[str, typer.Option(help="Layout of the data: camvid, cityscapes or folder.")] = "camvid",
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "val",
    backend: Annotated[str, typer.Option(help="auto, torch, onnxruntime or openvino.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16…; the model's own if left out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    boundary_tolerance: Annotated[int, typer.Option(help="Of the boundary F-score, in pixels of the labels.")] = 3,
    min_miou: Annotated[float | None, typer.Option(help="Exit with 3 where the mIoU (0 to 100) is below this.")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Scores a model's masks on a labelled data set: mIoU, pixel accuracy, boundary F-score."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ddsm_deploy.cli.render import write_json
    from ddsm_deploy.datasets import open_dataset
    from ddsm_deploy.errors import GateError
    from ddsm_deploy.evaluate.accuracy import evaluate as run
    from ddsm_deploy.runtime.segmenter import Segmenter

    samples = open_dataset(dataset, data, split)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    with (
        Segmenter.open(model, backend=backend, precision=precision, threads=threads) as segmenter,
        Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar,
    ):
        task = bar.add_task(f"{segmenter.backend} {segmenter.precision}", total=len(samples.samples))
        result = run(
            segmenter,
            samples,
            boundary_tolerance=boundary_tolerance,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json())
    if min_miou is not None and not result.miou >= min_miou:
        raise GateError(f"mIoU is {result.miou:.3f}; expected at least {min_miou:g}")


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

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"{result.model} on {result.dataset} {result.split}: {result.images} images; {result.choice}")
    console.print(table)
    line(f"mIoU {_percent(result.miou)} %, pixel accuracy {_percent(result.pixel_accuracy)} %")


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"  # NaN: the class does not appear
