"""The plot of what quantizing each layer costs."""

from __future__ import annotations

from pathlib import Path

from ddsm_deploy.errors import BackendMissing, ConfigError
from ddsm_deploy.files import replacing
from ddsm_deploy.optimize.sensitivity import Search


def plot_sensitivity(search: Search, output: str | Path, *, title: str) -> None:
    """Draws one bar a layer, in the network's order, as a PNG; layers left in float are marked.

    Raises:
        ConfigError: the search measured no single layer.
        BackendMissing: matplotlib is not installed.
        InputError: the file can't be written.
    """
    if not search.costs:
        raise ConfigError("no single layer was measured, so there is nothing to plot; ask for the sensitivity")
    try:
        from matplotlib.figure import Figure  # not pyplot: that would open a display and keep global state
    except ImportError as exc:
        raise BackendMissing("matplotlib", extra="quantize", why=str(exc)) from exc
    kept = {layer.name for layer in search.kept}
    heights = [cost.changed for cost in search.costs]
    colours = ["#c44e52" if cost.layer.name in kept else "#4c72b0" for cost in search.costs]
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(len(heights)), heights, color=colours, width=0.8)
    blocks = [cost.layer.block for cost in search.costs]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xticks([start - 0.4 for start in starts], [blocks[i] for i in starts], rotation=60, ha="right", fontsize=8)
    axes.set_xlim(-0.8, len(heights) - 0.2)
    axes.set_ylabel("pixels that change class, %\n(this layer alone quantized)")
    axes.set_title(
        f"{title}: all {len(heights)} layers together {search.all_quantized.changed:.2f} %, "
        f"without the {len(kept)} red ones {search.result.changed:.2f} %"
    )
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(Path(output)) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
