"""Quality against time: README's section with a picture, and the table of docs/choosing.md.

They come from the curves.json of a `kronblocks compare`, kept as benchmarks/results/time-to-quality.json. Without that file
there is neither.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from kronblocks_lab.bench.page.tables import count, fill, table
from kronblocks_lab.pages.front_figures import THEMES, apart, themed_figure
from kronblocks_lab.report.curves import AXES, Curve, mean_curve
from kronblocks_lab.report.measures import ACCURACY, LOSS, Measure

FILE = "time-to-quality.json"
OURS = "two-phase"


class Line(NamedTuple):
    """A method's mean curve, in the measure's unit, and where its trainings ended in the mean."""

    name: str
    method: str
    curve: Curve
    end: float
    final: float


class Comparison(NamedTuple):
    """What a comparison's curves.json says of its one task."""

    name: str
    content: dict[str, Any]

    @property
    def measure(self) -> Measure:
        """What the methods are compared by."""
        return {each.name: each for each in (ACCURACY, LOSS)}[self.content["measure"]]

    def lines(self) -> list[Line]:
        """The means over the seeds."""
        found = []
        for line in self.content["lines"]:
            every = zip(line["x"], line["y"], line["sparse_from"], strict=True)
            curves = [Curve(np.array(x), self.measure.scale * np.array(y), first) for x, y, first in every]
            end, final = (fmean(values) for values in zip(*((curve.end, curve.final) for curve in curves), strict=True))
            several = sum(other["method"] == line["method"] for other in self.content["lines"]) > 1
            name = line["name"] if several else line["method"]
            found.append(Line(name, line["method"], mean_curve(curves)[0], end, final))
        return found


def comparison(results: Path) -> Comparison | None:
    """The comparison in a folder of results; None where there is none with dense."""
    file = results / FILE
    if not file.exists():
        return None
    found = [Comparison(name, content) for name, content in json.loads(file.read_text()).items()]
    return next((each for each in found if each.content["target"] is not None), None)


def _sentence(line: dict[str, Any], cells: list[str], head: list[str]) -> str:
    """When a method reached dense's quality."""
    when = cells[head.index(next(name for name in head if name.startswith("To dense's")))]
    return f"{line['name']}: {when}"


def rows(results: Path) -> list[str]:
    """The table, and how it was measured; nothing without results."""
    found = comparison(results)
    if found is None:
        return []
    content = found.content
    lines = []
    for line, cells in zip(content["lines"], content["table"], strict=True):
        lines.append([f"{line['name']} ({line['about']})" if line["about"] else line["name"], *cells[1:]])
    return [*table(content["head"], lines), "", *_about(found)]


def _about(found: Comparison) -> list[str]:
    """How it was measured, in short lines."""
    seeds = count(len(set(found.content["lines"][0]["seeds"])), "seed")
    about = (f"{found.name}.", f"{found.content['note']} Validation data, mean of {seeds}.")
    return [line for sentence in about for line in textwrap.wrap(sentence, 98, break_on_hyphens=False)]


def with_section(text: str, results: Path, folder: str) -> str:
    """README with the section before that on speed; as it is where there are no results.

    Args:
        text: of README.
        results: folder of the results.
        folder: of the pictures, as README writes it.
    """
    lines = section(results, folder)
    if not lines:
        return text
    if "<!-- begin table: time -->" not in text:
        text = text.replace("## Speed\n", "<!-- begin table: time -->\n<!-- end table: time -->\n\n## Speed\n", 1)
    return fill(text, "time", lines)


def section(results: Path, folder: str) -> list[str]:
    """The section's lines; none without results."""
    found = comparison(results)
    if found is None:
        return []
    content, head = found.content, found.content["head"]
    axis = AXES[content["axis"]]
    unit = next(name for name in head if name.startswith("To dense's"))
    told = "; ".join(_sentence(line, cells, head) for line, cells in zip(content["lines"], content["table"], strict=True))
    alt = f"Validation {found.measure.name} against {axis.name}. {unit}: {told}."
    return [
        "## Quality for the same time",
        "",
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/time-to-quality-dark.svg">',
        f'<img alt="{alt}" src="{folder}/time-to-quality-light.svg"></picture>',
        "",
        *_about(found),
        "[The numbers](docs/choosing.md#the-best-model-for-your-time).",
    ]


def draw(results: Path, folder: Path) -> None:
    """The picture, for light and dark pages."""
    found = comparison(results)
    if found is None:
        return
    lines, measure, whole = found.lines(), found.measure, found.content["whole"]
    target = measure.scale * found.content["target"]
    ends = sorted(lines, key=lambda line: -line.final)
    low, high = _limits(lines, target, whole, more=measure.more_is_better)
    places = dict(zip([line.name for line in ends], apart([line.final for line in ends], (high - low) / 15), strict=True))
    last = max(line.end for line in lines)
    for theme in THEMES:
        with themed_figure(folder / "time-to-quality", theme, 4.4) as figure:
            axes = figure.add_axes((0.1, 0.14, 0.61, 0.76))
            axes.set_title(f"Validation {measure.name}, {measure.unit}", x=-0.15, pad=12)
            axes.axhline(target, color=theme.soft, linewidth=1.4, linestyle=(0, (4, 3)))
            for line in lines:
                own = line.method == OURS
                colour = theme.ours if own else theme.ink if line.method == "dense" else theme.soft
                x, y, first, _ = line.curve
                axes.plot(x[: first + 1], y[: first + 1], color=colour, linewidth=1.2, linestyle=(0, (1, 1)))
                axes.plot(x[first:], y[first:], color=colour, linewidth=3.2 if own else 1.8, zorder=3 if own else 2)
                axes.plot(line.end, line.final, marker="o", color=colour, markersize=6)
                link = {"arrowstyle": "-", "color": theme.faint, "linewidth": 0.8, "shrinkB": 5, "relpos": (0, 0.5)}
                axes.annotate(
                    f"{line.name} {line.final:.{2 if measure is LOSS else 1}f}",
                    (line.end, line.final),
                    xytext=(1.06 * last, places[line.name]),
                    va="center",
                    color=colour,
                    fontweight="bold" if own else "normal",
                    fontsize=12,
                    arrowprops=link,
                    annotation_clip=False,
                )
            axes.set_xlim(0, 1.03 * last)
            axes.set_ylim(low, high)
            axes.set_xlabel(AXES[found.content["axis"]].label)
            axes.grid(axis="y", alpha=0.6, linewidth=0.8)
            axes.tick_params(length=0)


def _limits(lines: list[Line], target: float, whole: float, *, more: bool) -> tuple[float, float]:
    """What the y axis shows: all ends, and what the methods had at a fifth of dense's time."""
    early = [float(np.interp(0.2 * whole, line.curve.x, line.curve.y)) for line in lines]
    best = [float(line.curve.y.max() if more else line.curve.y.min()) for line in lines]
    low, high = min([*early, *best, target]), max([*early, *best, target])
    margin = 0.05 * (high - low) or 0.01
    return low - margin, high + margin
