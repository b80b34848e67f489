"""The figures of the benchmark page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kronblocks_lab.bench.cases.ways import BOTH, FORWARD
from kronblocks_lab.bench.page.tables import Row, blocks_of, find, ms, ratio

_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c9cdd4",
    "text.color": "#22252b",
}
_BLOCK_COLOURS = ("#a6c8e4", "#5fa2d0", "#0072b2", "#004a80", "#e69f00", "#d55e00", "#7a3b00")
_COLOURS = {"dense": "#757a84", "authors": "#cc79a7", "factors": "#0072b2", "packed": "#009e73", "auto": "#009e73"}
_LEVELS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _density_panel(axes: Axes, rows: Sequence[Row], blocks: Sequence[str], colours: dict[str, str]) -> None:
    densities = sorted({row["density"] for row in rows})
    axes.plot(densities, [1 / density for density in densities], color="#22252b", linewidth=1, linestyle=(0, (2, 2)))
    axes.axhline(1, color="#757a84", linewidth=1)
    for block in blocks:
        line = sorted(find(rows, block=block), key=lambda row: row["density"])
        height, width = block.split("x")
        style: dict[str, Any] = {"color": colours[block], "linestyle": "-" if height == width else "--"}
        x, speeds = [row["density"] for row in line], [row["speed"] for row in line]
        axes.plot(x, speeds, marker="o", markersize=4, linewidth=1.6, label=block, **style)
        low, high = ([row[name] for row in line] for name in ("speed_low", "speed_high"))
        axes.fill_between(x, low, high, color=colours[block], alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    low, high = axes.get_ylim()
    axes.set_yticks([level for level in _LEVELS if low <= level <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_xlabel("density: share of live blocks")


def packed_figure(rows: Sequence[Row], shape: str, count: int, path: Path) -> bool:
    """Speed of the packed plan against density, a line for each block size; False where there are too few rows for one."""
    wanted = find(rows, shape=shape, rows=count, case="values packed")
    directions = [direction for direction in (FORWARD, BOTH) if find(wanted, direction=direction)]
    if len({row["density"] for row in wanted}) < 2:
        return False
    blocks = blocks_of(wanted)
    colours = {block: _BLOCK_COLOURS[number % len(_BLOCK_COLOURS)] for number, block in enumerate(blocks)}
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2 * len(directions) + 0.9, 3.8), layout="constrained")
        panels = figure.subplots(1, len(directions), sharey=True, squeeze=False)[0]
        for axes, direction in zip(panels, directions, strict=True):
            _density_panel(axes, find(wanted, direction=direction), blocks, colours)
            axes.set_title(f"{direction}, {shape}, {count:,} rows")
        panels[0].set_ylabel("times as fast as dense")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, title="block", loc="outside right center", frameon=False)
        axes = panels[0]
        axes.annotate("limit: 1/density", (0.13, 1 / 0.13), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.annotate("dense", (axes.get_xlim()[0], 1), xytext=(3, 3), textcoords="offset points", fontsize=8, color="#757a84")
        _save(figure, path)
    return True


def step_figure(rows: Sequence[Row], path: Path) -> None:
    """Time of one training step, a bar for each model, a panel for each batch size."""
    counts = sorted({row["rows"] for row in rows})
    shown = [row["case"] for row in find(rows, rows=counts[0]) if "auto" not in row["case"]]
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.1 * len(counts) + 2.6, 0.26 * len(shown) + 1.1), layout="constrained")
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for axes, count in zip(panels, counts, strict=True):
            bars = [row for name in shown for row in find(rows, rows=count, case=name)]
            places = [shown.index(row["case"]) for row in bars]
            errors = [[r["ms"] - r["ms_low"] for r in bars], [r["ms_high"] - r["ms"] for r in bars]]
            colours = [_COLOURS.get(row["case"].split()[0].rstrip(","), "#56b4e9") for row in bars]
            look: dict[str, Any] = {"error_kw": {"elinewidth": 0.8, "ecolor": "#22252b"}, "height": 0.72}
            axes.barh(places, [row["ms"] for row in bars], xerr=errors, color=colours, **look)
            for place, row in zip(places, bars, strict=True):
                text = f"{ms(row['ms'])} ms, {ratio(row['speed'])}x" if row["case"] != "dense" else f"{ms(row['ms'])} ms"
                at: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
                axes.annotate(text, (row["ms_high"], place), bbox=box, **at)
            axes.axvline(find(bars, case="dense")[0]["ms"], color="#757a84", linewidth=0.8, linestyle=(0, (2, 2)))
            axes.set_xlim(0, 1.28 * max(row["ms_high"] for row in bars))
            axes.set_title(f"{count:,} rows")
            axes.set_xlabel("milliseconds of one training step")
        panels[0].set_yticks(range(len(shown)), shown)
        panels[0].invert_yaxis()
        _save(figure, path)
