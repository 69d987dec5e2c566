"""`ddsm quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.optimize.quantize import QuantizeReport

_SHOWN = 12  # of the most sensitive layers; --report has all


def quantize(
    model: Annotated[
        str | None, typer.Argument(help="ONNX file, bundle or shipped model.", show_default="ddsm-lite0")
    ] = None,
    *,
    calibration: Annotated[Path, typer.Option(help="Folder of images, or with --dataset the root of a data set.")],
    target: Annotated[str, typer.Option(help="What will run it: tensorrt, onnxruntime or openvino.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write.", show_default="NAME-PRECISION-TARGET.onnx"),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="camvid, cityscapes or folder: brings labels, so mIoU.")] = None,
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "train",
    fp16: Annotated[bool, typer.Option("--fp16", help="The rest in float16 (tensorrt only).")] = False,
    images: Annotated[int, typer.Option(help="Images to calibrate on, evenly chosen.")] = 64,
    method: Annotated[str, typer.Option(help="Of calibration: percentile, minmax or entropy.")] = "percentile",
    percentile: Annotated[float, typer.Option(help="Share of the values kept on each side, per cent.")] = 99.99,
    max_changed: Annotated[float, typer.Option(help="Budget: per cent of the pixels that may change class.")] = 1.5,
    max_miou_drop: Annotated[float, typer.Option(help="Budget: points of mIoU, where there are labels.")] = 0.5,
    keep: Annotated[
        list[str] | None, typer.Option(help="Layers to leave in float, as in 'head.*'; repeatable.")
    ] = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="Measure each layer in any case.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw each layer's cost to this PNG; asks for --sensitivity.")
    ] = None,
    weight_bits: Annotated[int, typer.Option(help="8, or 7 for processors without VNNI.")] = 8,
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write the file even if it fails the budget.")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Writes a model as INT8 for a target, leaving out the fewest layers that keep its masks within a budget."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ddsm_deploy.artifact import resolve
    from ddsm_deploy.cli.render import check_json, require, write_json
    from ddsm_deploy.datasets import open_dataset
    from ddsm_deploy.frames import frames_in, frames_of

    with require("quantize"):
        from ddsm_deploy.optimize.plot import plot_sensitivity
        from ddsm_deploy.optimize.quantize import QuantizeOptions
        from ddsm_deploy.optimize.quantize import quantize as run

    options = QuantizeOptions(
        target=target,
        fp16=fp16,
        images=images,
        method=method,
        percentile=percentile,
        changed=max_changed,
        miou_drop=max_miou_drop,
        keep=tuple(keep or ()),
        sensitivity=sensitivity or plot is not None,
        weight_bits=weight_bits,
        threads=threads,
        force=force,
    )
    artifact = resolve(model)
    frames = frames_of(open_dataset(dataset, calibration, split)) if dataset else frames_in(calibration)
    output = output or Path(f"{artifact.name}-{options.precision}-{target}.onnx")
    check_json(json_file)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        report = run(
            artifact,
            output,
            frames,
            options,
            progress=lambda text, done, planned: bar.update(task, description=text, completed=done, total=planned),
        )
    _show(report, Console(stderr=json_file == "-"))
    if plot is not None:
        plot_sensitivity(report.search, plot, title=f"{artifact.name}, INT8 for {target}")
    if json_file is not None:
        write_json(json_file, report.to_json())


def _show(report: QuantizeReport, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    search, parity = report.search, report.parity
    if search.costs:
        kept = {layer.name for layer in search.kept}
        table = Table(title="what quantizing one layer alone costs")
        table.add_column("layer")
        table.add_column("pixels changed %", justify="right")
        table.add_column("mIoU lost", justify="right")
        table.add_column("")
        for cost in sorted(search.costs, key=lambda cost: -cost.changed)[:_SHOWN]:
            lost = "–" if cost.miou_drop is None else f"{cost.miou_drop:+.2f}"
            state = "left in float" if cost.layer.name in kept else ""
            table.add_row(escape(cost.layer.label), f"{cost.changed:.3f}", lost, state)
        console.print(table)
    for doubt in report.doubts:
        line(f"warning: {doubt}")
    facts = report.spec.provenance
    line(
        f"{report.path}: {report.bytes / 1e6:.1f} MB, {facts['quantized']} in INT8 for {facts['target']}, calibrated "
        f"on {facts['calibration.images']} images ({facts['calibration.method']}); made in {report.seconds:.0f} s."
    )
    text = f"On {parity.images} images {parity.changed:.2f} % of the pixels change class on {report.checked_on}"
    if parity.miou_a is not None and parity.miou_b is not None:
        text += f"; mIoU {parity.miou_b:.2f}, in float {parity.miou_a:.2f}"
    line(f"{text}.")
    for failure in parity.failures:
        line(f"warning: {failure}")
