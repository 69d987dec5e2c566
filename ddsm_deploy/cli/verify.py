"""`ddsm verify`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddsm_deploy.cli.options import Provider

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.layers import LayersResult
    from ddsm_deploy.evaluate.verify import VerifyResult

_SHOWN = 10
"""Changes and layers listed on the terminal; all are in ``--json``."""


def verify(
    a: Annotated[
        str | None,
        typer.Argument(metavar="A", help="Reference: ONNX file, checkpoint, bundle…", show_default="ddsm-lite0"),
    ] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="What is judged; else the same model as A.")] = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder of images, or with --dataset the data set's root.")],
    dataset: Annotated[str | None, typer.Option(help="camvid, cityscapes or folder; else images alone.")] = None,
    split: Annotated[str, typer.Option(help="Part of the data set.")] = "val",
    images: Annotated[int | None, typer.Option(help="Compare on so many, evenly spaced; else on all.")] = None,
    backend_a: Annotated[str | None, typer.Option(help="What runs A; else onnxruntime where it can.")] = None,
    backend_b: Annotated[str | None, typer.Option(help="What runs B; likewise.")] = None,
    precision_a: Annotated[str | None, typer.Option(help="fp32, bf16…; else A's own.")] = None,
    precision_b: Annotated[str | None, typer.Option(help="Likewise of B.")] = None,
    sampling_a: Annotated[str | None, typer.Option(help="fused or portable; else fused if possible.")] = None,
    sampling_b: Annotated[str | None, typer.Option(help="Likewise of B.")] = None,
    provider_a: Provider = "cpu",
    provider_b: Annotated[str, typer.Option(help="Likewise for B.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    max_changed: Annotated[
        float | None,
        typer.Option(
            metavar="PCT",
            help="Most % of pixels whose class may differ; else 0.1 for fp32, 1 for fp16/bf16, 5 for int8.",
        ),
    ] = None,
    max_miou_drop: Annotated[
        float | None, typer.Option(metavar="PTS", help="Most points that B's mIoU may lie below A's; needs --dataset.")
    ] = None,
    max_logit_error: Annotated[
        float | None, typer.Option(metavar="X", help="Largest difference of a logit; needs models that give them.")
    ] = None,
    boundary: Annotated[int, typer.Option(metavar="K", help="Reach of a class boundary, in pixels.")] = 3,
    picture: Annotated[Path | None, typer.Option(help="Draw the worst frames into this PNG.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Find the first layer at which A and B part.")] = False,
    noise_floor: Annotated[
        float | None, typer.Option(metavar="X", help="Relative error above which a layer counts as parted.")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
) -> None:
    """Compares two runs of a model, pixel by pixel: two files, two backends or two precisions. Exit 3 over budget."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ddsm_deploy.cli.render import check_json, write_json
    from ddsm_deploy.errors import ConfigError, GateError
    from ddsm_deploy.evaluate.layers import LayersOptions
    from ddsm_deploy.evaluate.verify import VerifyOptions
    from ddsm_deploy.evaluate.verify import verify as run

    if noise_floor is not None and not layers:
        raise ConfigError("--noise-floor belongs to --layers; give both or none")
    options = VerifyOptions(
        data=data,
        dataset=dataset,
        split=split,
        images=images,
        backend_a=backend_a,
        backend_b=backend_b,
        precision_a=precision_a,
        precision_b=precision_b,
        sampling_a=sampling_a,
        sampling_b=sampling_b,
        provider_a=provider_a,
        provider_b=provider_b,
        threads=threads,
        max_changed=max_changed,
        max_miou_drop=max_miou_drop,
        max_logit_error=max_logit_error,
        boundary=boundary,
        picture=picture,
        layers=LayersOptions(noise_floor=noise_floor) if layers else None,
    )
    check_json(json_file)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("comparing", total=None)
        result = run(
            a,
            b,
            options,
            progress=lambda text, done, total: bar.update(task, description=text, completed=done, total=total),
        )
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json())
    if not result:
        raise GateError(f"not the same: {'; '.join(result.failures)}")


def _show(result: VerifyResult, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(f"A: {result.a}")
    line(f"B: {result.b}")
    budget = f"budget {result.budget.changed:g} %"
    line(f"{result.images} frames, {result.pixels} pixels: {_share(result.changed)} % changed class ({budget})")
    near, elsewhere = _share(result.changed_near_boundary), _share(result.changed_elsewhere)
    line(f"within {result.boundary_px} px of a class boundary {near} %, elsewhere {elsewhere} %")
    if result.miou_a is not None and result.miou_b is not None and result.miou_drop is not None:
        change = round(-result.miou_drop, 2) + 0.0  # + 0.0: no -0.00
        line(f"mIoU: A {result.miou_a:.2f}, B {result.miou_b:.2f} ({change:+.2f})")
    if result.max_logit_error is not None:
        line(f"logits: off by {result.max_logit_error:.3g} at most, {result.mean_logit_error:.3g} on average")
    if changes := result.changes(_SHOWN):
        table = Table(title="commonest changes", title_justify="left")
        for heading in ("class in A", "in B", "pixels", "% of A's"):
            table.add_column(heading, justify="left" if "in" in heading else "right")
        for first, second, pixels in changes:
            share = 100 * pixels / result.pixels_of(first)
            table.add_row(escape(first), escape(second), str(pixels), _share(share))
        console.print(table)
        worst = ", ".join(f"{name} ({_share(share)} %)" for name, share in result.worst if share)
        line(f"worst frames: {worst}")
    if result.layers is not None:
        _show_layers(result.layers, console)


def _show_layers(result: LayersResult, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="largest jumps of the error, in the graph's order", title_justify="left")
    for heading in ("node", "operator", "tensor", "error before", "after"):
        table.add_column(heading, justify="right" if heading in ("error before", "after") else "left")
    for layer in result.jumps(_SHOWN):
        table.add_row(
            escape(layer.node), layer.op_type, escape(layer.tensor), f"{layer.error_before:.1e}", f"{layer.error:.1e}"
        )
    console.print(table)
    console.print(result.sentence(), markup=False, highlight=False, soft_wrap=True)


def _share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}" if value < 1 else f"{value:.2f}"  # NaN: there is no such pixel
