"""The figure of quality against time in a report."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from kronblocks_lab.report.comparison import Task
from kronblocks_lab.report.curves import mean_curve
from kronblocks_lab.report.figures import INK, SOFT, Picture, looks, panel, quality_axis
from kronblocks_lab.report.time_to_quality import SHARES, TimeToQuality


def quality_over_time(task: Task, times: TimeToQuality) -> Picture:
    """Every training thin, the mean of a row thick with a band of one standard deviation, and dense's final quality dashed."""

    def draw(axes: Axes) -> None:
        values = [float(value) for line in times.lines for curve in line.curves for value in curve.y]
        y = quality_axis(axes, task, values, "validation")
        look_of = dict(zip([row.name for row in task.rows], looks(task), strict=True))
        for line in times.lines:
            look = look_of[line.row.name]
            mean, spread = mean_curve(line.curves)
            dash = (0, look.dash) if look.dash else "-"
            first = max(0, min(mean.from_, len(mean.x) - 1))
            for curve in line.curves:
                axes.plot(curve.x, y(curve.y), color=look.colour, linewidth=0.8, alpha=0.35)
            if spread.any():
                axes.fill_between(mean.x, y(mean.y - spread), y(mean.y + spread), color=look.colour, alpha=0.15, linewidth=0)
            mark = look.marker if len(mean.x) == 1 else None
            axes.plot(mean.x[: first + 1], y(mean.y[: first + 1]), color=look.colour, linewidth=1.3, linestyle=(0, (1, 1)))
            axes.plot(mean.x[first:], y(mean.y[first:]), marker=mark, color=look.colour, linewidth=2.2, linestyle=dash)
        if times.target is not None and times.whole is not None:
            axes.axhline(float(y(np.array([times.target]))[0]), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            for share in SHARES:
                axes.axvline(share * times.whole, color=SOFT, linewidth=0.6, linestyle=(0, (1, 3)), zorder=1)
                above = axes.get_xaxis_transform()
                axes.text(share * times.whole, 0.01, f"{100 * share:g}%", transform=above, fontsize=7.5, color=SOFT, ha="right")
        axes.set_xlim(left=0)
        axes.set_xlabel(times.axis.label)

    return panel(draw, f"validation {times.measure.name} against {times.axis.name}; the table holds the numbers")
