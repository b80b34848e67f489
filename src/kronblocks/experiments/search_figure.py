"""The picture of a block-size search: loss against cost, or every candidate's norm over the steps."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kronblocks.experiments.figures import Picture, panel
from kronblocks.search.report import SearchReport

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#757a84")


def draw(report: SearchReport, path: Path) -> None:
    """Write the picture of a search as PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _candidates(axes, report)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    chosen = str(report.winner) if report.winner else ", ".join(f"{name}: {size}" for name, size in report.chosen.items())
    axes.set_title(f"Block-size search by {report.criterion}: {chosen}", loc="left", fontsize=10)
    figure.savefig(path, dpi=160)


def picture(report: SearchReport) -> Picture:
    """The same for a page."""
    return panel(lambda axes: _candidates(axes, report), "candidates of the block-size search; the table holds the numbers")


def _candidates(axes: Axes, report: SearchReport) -> None:
    (_norms if any(candidate.history for candidate in report.paths) else _losses)(axes, report)


def _losses(axes: Axes, report: SearchReport) -> None:
    """Held-out loss against the time of a step, a point for each round; the winner is filled."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    for number, (colour, path) in enumerate(zip(COLOURS, report.paths, strict=False)):
        rungs = [rung for rung in path.rungs if math.isfinite(rung.loss)]
        if not rungs:
            continue
        times, losses = [1e3 * rung.seconds_per_step for rung in rungs], [rung.loss for rung in rungs]
        axes.plot(times, losses, color=colour, linewidth=1)
        face = colour if path.block == report.winner else "white"
        errors = [rung.gap_error for rung in rungs]
        axes.errorbar(times, losses, yerr=errors, fmt="o", color=colour, markerfacecolor=face, capsize=3)
        place = (7, 5 if number % 2 else -14)  # neighbours are often close together
        axes.annotate(str(path.block), (times[-1], losses[-1]), xytext=place, textcoords="offset points", color=colour)
    axes.set_xlabel("milliseconds a training step")
    axes.set_ylabel("held-out loss, after each round")


def _norms(axes: Axes, report: SearchReport) -> None:
    """Norm of every candidate's weights over the steps; a line ends where the candidate was removed."""
    for colour, path in zip(COLOURS, report.paths, strict=False):
        if path.history:
            steps, norms = [point["step"] for point in path.history], [point["norm"] for point in path.history]
            width = 2.5 if path.block == report.winner else 1.2
            axes.plot(steps, norms, color=colour, linewidth=width)
            axes.plot(steps[-1], norms[-1], marker="o" if path.block == report.winner else "x", color=colour)
            axes.annotate(str(path.block), (steps[-1], norms[-1]), xytext=(6, 2), textcoords="offset points", color=colour)
    axes.set_xlabel("step of the search")
    axes.set_ylabel("norm of the candidate's weights")
