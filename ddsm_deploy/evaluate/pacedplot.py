"""The plot of a paced run: latency over time, and how many frames take longer than how long."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ddsm_deploy.errors import BackendMissing
from ddsm_deploy.evaluate.paced import PacedResult
from ddsm_deploy.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GOOD, _BAD = "#4c72b0", "#c44e52"


def new_figure() -> Figure:
    """An empty figure, which a caller may ask for early in order to fail before a long run.

    Raises:
        BackendMissing: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot: that would open a display and keep global state
    except ImportError as exc:
        raise BackendMissing("matplotlib", extra="quantize", why=str(exc)) from exc
    return Figure(figsize=(12, 4.5), layout="constrained")


def plot_paced(result: PacedResult, output: str | Path) -> None:
    """Draws a run as a PNG.

    Raises:
        BackendMissing: matplotlib is not installed.
        InputError: the file can't be written.
    """
    figure = new_figure()
    over_time, tail = figure.subplots(1, 2, width_ratios=(5, 3))
    _draw_latencies(over_time, result)
    _draw_tail(tail, result)
    for axes in (over_time, tail):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(result), fontsize=10)
    with replacing(Path(output)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _draw_latencies(axes: Axes, result: PacedResult) -> None:
    record, deadline = result.record, result.options.deadline
    seconds, latencies = record.due - record.due[0], record.latencies_ms
    dropped = ~record.delivered
    late = record.delivered & (latencies > deadline)
    for chosen, colour, label in (
        (record.delivered & ~late, _GOOD, "in time"),
        (late, _BAD, f"late ({np.count_nonzero(late)})"),
    ):
        axes.scatter(seconds[chosen], latencies[chosen], s=6, color=colour, linewidths=0, label=label)
    axes.axhline(deadline, color=_BAD, linewidth=1, label=f"deadline {deadline:.4g} ms")
    axes.set_ylim(0, 1.15 * max([deadline, *latencies[record.delivered]]))
    # at the upper edge, for a frame that never came has no latency
    axes.plot(
        seconds[dropped],
        np.full(np.count_nonzero(dropped), 0.985),
        linestyle="",
        marker="|",
        color="black",
        transform=axes.get_xaxis_transform(),
        label=f"dropped ({np.count_nonzero(dropped)})",
    )
    axes.set_xlabel("seconds since the first frame")
    axes.set_ylabel("latency, ms (frame due to mask)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4, fontsize=8, frameon=False)


def _draw_tail(axes: Axes, result: PacedResult) -> None:
    frames, deadline = len(result.record.due), result.options.deadline
    ordered = np.sort(result.record.latencies_ms[result.record.delivered])
    # of the frames that were due, dropped ones included: those never end
    longer = 100 * (frames - 1 - np.arange(len(ordered))) / frames
    axes.step([0, *ordered], [100, *longer], where="post", color=_GOOD)
    axes.axvline(deadline, color=_BAD, linewidth=1)
    if dropped := frames - len(ordered):
        axes.axhline(100 * dropped / frames, color="black", linewidth=1, linestyle=":", label="dropped")
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.set_yscale("log")
    axes.set_ylim(50 / frames, 130)
    ticks = [tick for tick in (100, 10, 1, 0.1, 0.01) if tick > 50 / frames]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim(left=min([deadline, *ordered]) * 0.8)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("frames that take longer, %")


def _title(result: PacedResult) -> str:
    settings, fields = result.settings, result.fields()
    load = f", busy processes beside it: {settings['load']}" if settings["load"] else ""
    head = (
        f"{settings['model']}, {result.size}, {settings['backend']} {settings['precision']}, "
        f"{settings['rate']:g} frames/s, policy {settings['policy']}{load}"
    )
    if fields["p50_ms"] is None:
        return f"{head}\nno frame got a mask"
    figures = [f"{name} {fields[name + '_ms']:.1f}" for name in ("p50", "p95", "p99", "max")]
    return f"{head}\n{', '.join(figures)} ms"
