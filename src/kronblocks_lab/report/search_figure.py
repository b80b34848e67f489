"""The picture of a block-size search: loss against cost, or every candidate's norm over the steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kronblocks.search.report import SearchReport
from kronblocks_lab.report.figures import Picture, panel

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#757a84")

_Part = Callable[[SearchReport, Axes], None]


def draw(report: SearchReport, path: Path) -> None:
    """Write the picture of a search as PNG."""
    parts = _parts(report)
    figure = Figure(figsize=(6.5 * len(parts), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, part in enumerate(parts, 1):
        axes = figure.add_subplot(1, len(parts), number)
        part(report, axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    chosen = str(report.winner) if report.winner else ", ".join(f"{name}: {size}" for name, size in report.chosen.items())
    figure.suptitle(f"Block-size search by {report.criterion}: {chosen}", x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=160)


def pictures(report: SearchReport) -> list[Picture]:
    """The same for a page."""
    words = "candidates of the block-size search; the table holds the numbers"
    return [panel(partial(part, report), words) for part in _parts(report)]


def _parts(report: SearchReport) -> list[_Part]:
    """What there is to draw."""
    there = {
        _losses: any(candidate.rungs for candidate in report.paths),
        _norms: any(candidate.history for candidate in report.paths),
    }
    return [part for part, is_there in there.items() if is_there]


def _losses(report: SearchReport, axes: Axes) -> None:
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


def _norms(report: SearchReport, axes: Axes) -> None:
    """Norm of every candidate's weights over the steps of the search; a line ends where the candidate was removed.

    If candidates begin again in each round, rounds are drawn one after the other.
    """
    starts = _starts(report)
    for colour, path in zip(COLOURS, report.paths, strict=False):
        if not path.history:
            continue
        won = path.block == report.winner
        for number, start in starts.items():
            points = [point for point in path.history if point.get("round", 1) == number]
            steps, norms = [start + point["step"] for point in points], [point["norm"] for point in points]
            axes.plot(steps, norms, color=colour, linewidth=2.5 if won else 1.2)
        last = path.history[-1]
        place = (starts[last.get("round", 1)] + last["step"], last["norm"])
        axes.plot(*place, marker="o" if won else "x", color=colour)
        axes.annotate(str(path.block), place, xytext=(6, 2), textcoords="offset points", color=colour)
    for start in list(starts.values())[1:]:
        axes.axvline(start, color="#626975", linewidth=0.8, linestyle=":")
    axes.set_xlabel("steps of a candidate, round after round" if len(starts) > 1 else "step of the search")
    axes.set_ylabel("norm of the candidate's weights")


def _starts(report: SearchReport) -> dict[float, float]:
    """How many steps were made before each round."""
    lengths: dict[float, float] = {}
    for point in itertools.chain.from_iterable(path.history for path in report.paths):
        number = point.get("round", 1)
        lengths[number] = max(lengths.get(number, 0), point["step"])
    rounds = sorted(lengths)
    ends = itertools.accumulate(lengths[number] for number in rounds)
    return dict(zip(rounds, [0, *ends], strict=False))
