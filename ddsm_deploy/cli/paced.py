"""`ddsm bench --rate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ddsm_deploy.evaluate.paced import PacedOptions, PacedResult


def bench_at_pace(
    model: str | None, options: PacedOptions, *, json_file: str | None, plot: Path | None, per_frame: bool
) -> None:
    """Measures, prints, writes what was asked for, and fails where the gate does."""
    from rich.console import Console

    from ddsm_deploy.cli.render import check_json, write_json
    from ddsm_deploy.errors import GateError
    from ddsm_deploy.evaluate.paced import bench_paced
    from ddsm_deploy.evaluate.pacedplot import new_figure, plot_paced

    if plot is not None:
        new_figure()  # a missing package is told before the run, not after it
    check_json(json_file)
    screen = Console(stderr=True)
    # plain lines, and none while frames come: a progress bar's own thread would disturb what is measured
    result = bench_paced(model, options, progress=lambda text: _line(screen, text) if screen.is_terminal else None)
    _show(result, Console(stderr=json_file == "-"))
    if json_file is not None:
        write_json(json_file, result.to_json(per_frame=per_frame))
    if plot is not None:
        plot_paced(result, plot)
    if result.record.interrupted:
        raise KeyboardInterrupt
    if result.verdict is not None and not result.verdict:
        raise GateError(f"over budget: {'; '.join(result.verdict.failures)}")


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show(result: PacedResult, console: Console) -> None:
    settings, fields, machine = result.settings, result.fields(), result.machine
    ran = f"{settings['backend']} {settings['precision']} {settings['sampling']}"
    average = f", load {machine['load_average'][0]:.1f} at the start" if machine["load_average"] else ""
    beside = f", busy processes beside it: {settings['load']}" if settings["load"] else ""
    lines = [
        f"{settings['model']}, {result.size}, {ran}; images: {settings['images']}",
        f"backend: {result.choice}",
        f"{machine['cpu']}, {machine['cores_usable']} cores{average}{beside}",
        f"{fields['frames']} frames at {settings['rate']:g} a second, policy {settings['policy']}",
        _latencies(result),
        f"deadline {settings['deadline_ms']:.4g} ms: {fields['deadline_misses']} late "
        f"({100 * fields['deadline_miss_share']:.2f} %), {fields['dropped']} dropped "
        f"({100 * fields['drop_share']:.2f} %), in time {100 * fields['in_time_share']:.2f} %",
        f"{fields['reordered']} masks out of order, {_mixed_up(result)}",
    ]
    if fields["rss_mb"] is not None:
        lines.append(f"memory {fields['rss_mb']:.0f} MB after warm-up, {fields['rss_growth_mb']:+.1f} MB at the end")
    if result.verdict is not None:
        lines += [f"warning: {text}" for text in result.verdict.warnings]
        lines += [f"{'pass' if check.passed else 'FAIL'}: {check.text}" for check in result.verdict.checks]
    for text in lines:
        _line(console, text)


def _latencies(result: PacedResult) -> str:
    fields = result.fields()
    if not fields["delivered"]:
        return "no frame got a mask"
    figures = ", ".join(f"{name} {fields[f'{name}_ms']:.1f}" for name in ("p50", "p95", "p99", "max", "jitter"))
    return f"latency in ms, from the moment a frame is due to its mask: {figures}"


def _mixed_up(result: PacedResult) -> str:
    if result.distinct_masks < 2:
        return "whether masks are mixed up can't be told: the images have the same mask"
    return f"{result.record.mixed_up} not their own frame's"
