"""The picture of a study: test accuracy or loss over sparsity, a panel for each block size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kronblocks.core.blocks import BlockSize
from kronblocks_lab.report.styles import COLOURS, OTHER_COLOUR
from kronblocks_lab.reproduce.statistics import OURS, CellResult


def draw(found: Sequence[CellResult], path: Path, title: str) -> None:
    """Write the picture as PNG: block sizes that were compared at more than one sparsity."""
    sparse = [cell for cell in found if cell.block]
    blocks = [block for block in dict.fromkeys(cell.block for cell in sparse) if len(_sparsities(sparse, block)) > 1]
    figure = Figure(figsize=(4.6 * len(blocks), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    dense = next((cell for cell in found if cell.method == "dense"), None)
    for axes, block in zip(panels, blocks, strict=True):
        _panel(axes, [cell for cell in sparse if cell.block == block], dense)
        axes.set_title(f"{BlockSize.parse(block)} blocks", loc="left", fontsize=10)
    panels[0].set_ylabel(found[0].measure.title.lower())
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(5, 3 * len(blocks)), frameon=False, fontsize=8.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _sparsities(cells: Sequence[CellResult], block: str) -> list[float]:
    return sorted({cell.sparsity for cell in cells if cell.block == block})


def _panel(axes: Axes, cells: Sequence[CellResult], dense: CellResult | None) -> None:
    """Error bars are the standard deviation between seeds; methods stand a little apart, so that these can be seen."""
    shares = sorted({cell.sparsity for cell in cells})
    methods = list(dict.fromkeys(cell.method for cell in cells))
    if dense is not None:
        axes.axhline(dense.quality, color=COLOURS["dense"], linestyle=(0, (4, 3)), linewidth=1.2, label="dense")
    for number, method in enumerate(methods):
        line = sorted((cell for cell in cells if cell.method == method), key=lambda cell: cell.sparsity)
        shift = 0.04 * (number - (len(methods) - 1) / 2)
        axes.errorbar(
            [shares.index(cell.sparsity) + shift for cell in line],
            [cell.quality for cell in line],
            yerr=[cell.spread for cell in line],
            color=COLOURS.get(method, OTHER_COLOUR),
            linewidth=2.4 if method == OURS else 1.2,
            marker="o",
            markersize=6 if method == OURS else 4,
            capsize=2,
            zorder=3 if method == OURS else 2,
            label=method,
        )
    axes.set_xticks(range(len(shares)), [f"{100 * share:g}%" for share in shares])
    axes.set_xlabel("weights in zero blocks")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
