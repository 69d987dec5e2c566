"""`ddsm bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddsm_deploy.cli.options import Provider

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.baseline import Gate
    from ddsm_deploy.evaluate.benchmark import BenchOptions, BenchResult

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
    provider: Provider = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of one inference; else the runtime's choice.")] = None,
    runs: Annotated[int | None, typer.Option(help="Timed runs on each backend.", show_default="100")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time limit of each backend's timed runs.", show_default="60")
    ] = None,
    warm_up: Annotated[int, typer.Option(help="Untimed runs before them.")] = 10,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images to run on; else noise, with --rate scenes.")
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="Write the result; - is standard output.")] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="FPS", help="Let frames come at a camera's pace; on one backend.")
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="With --rate: from frame to mask; else a frame's period.")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="With --rate: seconds.", show_default="60")] = None,
    policy: Annotated[
        str | None, typer.Option(help="With --rate: which frames wait, latest or every.", show_default="latest")
    ] = None,
    load: Annotated[
        int | None, typer.Option(metavar="N", help="With --rate: busy processes beside it.", show_default="0")
    ] = None,
    baseline: Annotated[Path | None, typer.Option(help="With --rate: an earlier --json; exit 3 if slower.")] = None,
    max_slower: Annotated[
        float | None,
        typer.Option(metavar="PCT", help="Most % above the baseline's p50 and p99.", show_default="10"),
    ] = None,
    max_misses: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --rate: most frames late or dropped, else exit 3.", show_default="0 with --baseline"
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="With --rate: draw the latencies into this PNG.")] = None,
    per_frame: Annotated[
        bool, typer.Option("--per-frame", help="With --rate: every frame's latency into --json.")
    ] = False,
) -> None:
    """Times a model on the backends that are installed, one image at a time, from image to mask.

    Without --backend and --precision, all that may run are tried, and those that can't run here say why. With --rate,
    frames come at a camera's pace instead, and what counts is how late their masks are.
    """
    tight = _given(runs=runs, seconds=seconds)
    paced = _given(deadline_ms=deadline_ms, duration=duration, policy=policy, load=load)
    gate = _given(baseline=baseline, max_slower=max_slower, max_misses=max_misses)
    if rate is None:
        from ddsm_deploy.evaluate.benchmark import BenchOptions

        _refuse({**paced, **gate, **_given(plot=plot, per_frame=per_frame or None)}, "goes with --rate alone")
        options = BenchOptions(
            backends=tuple(backend or ()),
            precisions=tuple(precision or ()),
            samplings=tuple(sampling or ()),
            provider=provider,
            threads=threads,
            warm_up=warm_up,
            images=images,
            **tight,
        )
        _bench_in_turns(model, options, json_file)
    else:
        from ddsm_deploy.cli.paced import bench_at_pace
        from ddsm_deploy.evaluate.paced import PacedOptions

        _refuse(tight, "does not go with --rate; --duration says how long")
        one = _given(backend=_one(backend, "backend"), precision=_one(precision, "precision"))
        one |= _given(sampling=_one(sampling, "sampling"), gate=_gate(gate))
        at_pace = PacedOptions(
            rate=rate, provider=provider, threads=threads, warm_up=warm_up, images=images, **one, **paced
        )
        bench_at_pace(model, at_pace, json_file=json_file, plot=plot, per_frame=per_frame)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given; the library has the defaults of the others."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse(given: dict[str, Any], why: str) -> None:
    from ddsm_deploy.errors import ConfigError

    for name in given:
        raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _one(values: list[str] | None, name: str) -> str | None:
    from ddsm_deploy.errors import ConfigError

    if values and len(values) > 1:
        raise ConfigError(f"--{name} is given {len(values)} times; with --rate one runs at a time")
    return values[0] if values else None


def _gate(given: dict[str, Any]) -> Gate | None:
    from ddsm_deploy.errors import ConfigError
    from ddsm_deploy.evaluate.baseline import Gate

    if "max_slower" in given and "baseline" not in given:
        raise ConfigError("--max-slower needs the --baseline that it compares with")
    return Gate(**given) if given else None


def _bench_in_turns(model: str | None, options: BenchOptions, json_file: str | None) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ddsm_deploy.cli.render import check_json, write_json
    from ddsm_deploy.errors import BackendError
    from ddsm_deploy.evaluate.benchmark import bench as run

    check_json(json_file)
    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=options.runs)
        result = run(
            model,
            options,
            progress=lambda text, done, planned: bar.update(task, description=text, completed=done, total=planned),
        )
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json())
    if result.interrupted:
        raise KeyboardInterrupt
    if all(row.error for row in result.rows):
        raise BackendError("no backend could run this model; the reasons are above")
    if missing := result.not_run():
        raise BackendError(f"asked for, and not run: {', '.join(missing)}; the reasons are above")


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
            table.add_row(row.label, *(_figure(fields[key], digits) for _, key, digits in _FIGURES))

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    machine = result.machine
    load = f", load {machine['load_average'][0]:.1f} at the start" if machine["load_average"] else ""
    size = "each image's own size" if result.size is None else f"{result.size[0]}x{result.size[1]}"
    line(f"{result.model}, {size}, batch 1, {result.images}")
    line(f"{machine['cpu']}, {machine['cores_usable']} cores{load}")
    if table.rows:
        console.print(table)
        line("times in ms from image to mask (infer: the network alone); peak memory in MB; no run left out")
    for row in result.rows:
        if row.error:
            line(f"{row.label}: {row.error}")


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
