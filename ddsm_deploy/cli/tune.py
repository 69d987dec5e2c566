"""`ddsm tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.tune import TuneResult


def tune(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    goal: Annotated[
        str, typer.Option("--for", help="latency: one image after the other; throughput: for ddsm segment.")
    ] = "latency",
    images: Annotated[Path | None, typer.Option(help="Folder of images like those to come; else drawn ones.")] = None,
    seconds: Annotated[float, typer.Option(help="Of timed runs, all candidates together.")] = 60.0,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Find the quickest backend, precision and options on this machine that stay right; auto uses them from then on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from ddsm_deploy.cli.render import check_json, write_json
    from ddsm_deploy.evaluate.tune import TuneOptions
    from ddsm_deploy.evaluate.tune import tune as run

    options = TuneOptions(goal=goal, images=images, seconds=seconds)
    check_json(json_file)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)
        result = run(
            model,
            options,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        )
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json())


def _show(result: TuneResult, console: Console) -> None:
    from rich import box
    from rich.table import Table

    from ddsm_deploy.evaluate.tune import difference

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("")
    for heading in ("p50", "p99", "FPS", "changed", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in result.rows:
        if row.latencies_ms:
            changed = "–" if row.candidate.changed is None else f"{row.candidate.changed:.2f} %"
            mark = "best" if row is result.best else "untuned" if row is result.usual else ""
            table.add_row(
                row.label(), f"{row.percentile(50):.1f}", f"{row.percentile(99):.1f}", f"{row.fps:.1f}", changed, mark
            )
    machine, decision = result.machine, result.decision
    load = f", load {machine['load_average'][0]:.1f} at the start" if machine["load_average"] else ""
    workers = result.best.workers
    line(f"{result.model}, for {result.options.goal}, {workers} at once, on {decision.frames}")
    line(f"{machine['cpu']}, {machine['cores_usable']} cores{load}")
    console.print(table)
    noise = "" if decision.noise is None else f"; noise of 2 levels changes {decision.noise:.2f} %"
    line(f"times in ms, the network alone; changed: pixels that differ from {decision.reference or 'nothing'}{noise}")
    for row in result.rows:
        if row.candidate.objection:
            line(f"{row.label()} passed over: {row.candidate.objection}")
    for other in decision.others:
        line(other)
    line(result.batch)
    what = difference(result.best.fields(), result.usual.fields()) or "nothing"
    line(f"best: {result.best.label()}, {result.gain:.2f}x untuned ({result.usual.label()}); changed: {what}")
    line(f"kept in {result.kept}" if result.kept else "not kept: the cache folder can't be written")
