"""The pictures of a report: panels as SVG, block maps as PNG, all as data URIs that a page can hold."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator

from kronblocks.core.blocks import BlockSize
from kronblocks_lab.report.costs import BYTES, Cost
from kronblocks_lab.report.measures import LOSS
from kronblocks_lab.report.styles import Style, styles

if TYPE_CHECKING:
    from kronblocks_lab.report.comparison import Task

PHASES = {"discover": "#eaf1f7", "refine": "#d3e3f0", "heal": "#f7f5ef"}
INK, SOFT, FAINT, GROUND = "#22252b", "#626975", "#c9cdd4", "#fdfdfc"

_FONTS = "system-ui, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kronblocks",
    "text.parse_math": False,  # names of layers and methods are text, whatever they contain
    "font.family": ["DejaVu Sans"],  # what every installation has; the page's own fonts take its place
    "font.size": 9,
    "axes.edgecolor": FAINT,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#e8eaee",
    **{f"{axis}tick.color": FAINT for axis in "xy"},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
}


class Picture(NamedTuple):
    """An image for a page; its source is a data URI."""

    source: str
    alt: str
    width: int
    height: int


def looks(task: Task) -> list[Style]:
    """How each row of a task is drawn."""
    return styles([row.method for row in task.rows])


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def panel(draw: Callable[[Axes], None], alt: str) -> Picture:
    """A picture of one drawing, as SVG."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.9, 3.5), layout="constrained", facecolor="none")
        draw(figure.add_subplot(facecolor="none"))
        file = io.StringIO()
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace("'DejaVu Sans', sans-serif", _FONTS).replace("'DejaVu Sans'", _FONTS)
    return Picture(_data_uri("svg+xml", svg.encode()), alt, 539, 385)


class _ShareAxis:
    """Shares on a y axis, in percent; accuracies that lie far apart on a logarithmic scale of the error."""

    def __init__(self, axes: Axes, values: Sequence[float], name: str, *, may_bend: bool = True) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        most, least = 100 * (1 - min(finite)), 100 * (1 - max(finite))  # errors
        self.by_error = may_bend and least > 0 and most - least > 15 and most / least > 4
        axes.set_title(f"{name}, %{' (log scale of the error)' if self.by_error else ''}")
        if not may_bend:
            axes.set_ylim(-3, 103)
        if self.by_error:
            axes.set_yscale("log")
            axes.set_ylim(min(100.0, 1.3 * most), 0.8 * least)
            digits = (1, 1.5, 2, 3, 5, 7) if most / least < 30 else (1, 2, 5)
            ticks = [digit * 10.0**power for power in range(-3, 2) for digit in digits]
            axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0.8 * least <= tick <= 1.3 * most]))
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g}"))

    def __call__(self, shares: Any) -> np.ndarray:
        percent = 100 * np.asarray(shares, dtype=float)
        return 100 - percent if self.by_error else percent


class _LossAxis:
    """Losses on a y axis; those at the start, which are far higher, may leave the picture."""

    def __init__(self, axes: Axes, values: Sequence[float], name: str) -> None:
        axes.set_title(name)
        finite = sorted(value for value in values if math.isfinite(value)) or [0.0]
        if len(finite) > 4 and finite[-1] > (high := finite[0] + 2.5 * (finite[len(finite) // 2] - finite[0]) + 0.05):
            axes.set_ylim(finite[0] - 0.05 * (high - finite[0]), high)

    def __call__(self, losses: Any) -> np.ndarray:
        return np.asarray(losses, dtype=float)


def quality_axis(axes: Axes, task: Task, values: Sequence[float], part: str) -> _ShareAxis | _LossAxis:
    """The axis of a task's measure, of its test or validation part."""
    if task.measure is LOSS:
        return _LossAxis(axes, values, f"{part} loss, {task.measure.unit}")
    return _ShareAxis(axes, values, f"{part} accuracy")


def quality_against_cost(task: Task, cost: Cost) -> Picture:
    """The measure of every run against a cost relative to dense, or against the cost itself where there is no dense run."""
    unit = task.dense.median(cost) if task.dense else cost.scale
    label = f"{cost.name} relative to dense" if task.dense else f"{cost.name}, {cost.unit}"

    def draw(axes: Axes) -> None:
        y = quality_axis(axes, task, [task.measure.of(run.result) for row in task.rows for run in row.runs], "test")
        if task.dense:
            axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for row, look in zip(task.rows, looks(task), strict=True):
            x = np.array(row.values(cost)) / unit
            y_runs, mark = (
                y([task.measure.of(run.result) for run in row.runs]),
                dict[str, Any](color=look.colour, marker=look.marker),
            )
            axes.plot(x, y_runs, linestyle="", markersize=4, alpha=0.45, zorder=2, **mark)
            axes.plot(np.median(x), y(row.quality), markersize=9, markeredgecolor="white", zorder=3, **mark)
        if task.dense:
            axes.set_xlim(min(axes.get_xlim()[0], 0.88), max(axes.get_xlim()[1], 1.12))
        axes.set_xlabel(label)

    return panel(draw, f"test {task.measure.name} against {label}, one point per run; the table holds the numbers")


def phases(task: Task) -> list[tuple[str, int, int]]:
    """Phases of two-phase and the first and the last epoch that ended in each; empty unless all its runs agree."""
    runs = [run for row in task.rows if row.method == "two-phase" for run in row.runs]
    paths = {tuple(str(epoch["phase"]) for epoch in run.result["history"]) for run in runs}
    if len(paths) != 1:
        return []
    spans = [(phase, [epoch for epoch, _ in group]) for phase, group in groupby(enumerate(paths.pop(), 1), lambda each: each[1])]
    return [(phase, epochs[0], epochs[-1]) for phase, epochs in spans]


def _over_epochs(axes: Axes, task: Task) -> None:
    """What the panels over epochs share: the x axis and the phases, shaded."""
    axes.set_xlim(*axes.get_xlim())
    spans = phases(task)
    for phase, first, last in spans:
        low = first - 0.5 if first > 1 else axes.get_xlim()[0]
        high = min(last + 0.5, axes.get_xlim()[1])
        axes.axvspan(low, high, color=PHASES.get(phase, "#f2f2f2"), linewidth=0, zorder=0)
        above = axes.get_xaxis_transform()
        axes.text((low + high) / 2, 1.01, phase, transform=above, ha="center", va="bottom", fontsize=7.5, color=SOFT)
    axes.set_title(axes.get_title("left"), pad=17 if spans else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")


def history(task: Task, what: Literal["quality", "block_sparsity"]) -> Picture:
    """The measure on validation data, or the sparsity, after every epoch: every run thin, the mean thick."""
    name = f"validation {task.measure.name}" if what == "quality" else "weights in zero blocks"
    key = f"validation_{task.measure.name}" if what == "quality" else what

    def draw(axes: Axes) -> None:
        curves = [[run.history(key) for run in row.runs] for row in task.rows]
        values = [value for row in curves for run in row for value in run]
        quality = what == "quality"
        y = quality_axis(axes, task, values, "validation") if quality else _ShareAxis(axes, values, name, may_bend=False)
        for row, look in zip(curves, looks(task), strict=True):
            dash = (0, look.dash) if look.dash else "-"
            for run in row:
                axes.plot(range(1, len(run) + 1), y(run), color=look.colour, linewidth=0.8, alpha=0.4)
            epochs = range(1, min(map(len, row)) + 1)  # within a budget of time trainings may have more or fewer
            mark = look.marker if len(epochs) == 1 else None
            mean = y(np.mean([run[: len(epochs)] for run in row], axis=0))
            axes.plot(epochs, mean, marker=mark, color=look.colour, linewidth=2.2, linestyle=dash)
        _over_epochs(axes, task)

    return panel(draw, f"{name} over the epochs, one thin line per run and a thick one for the mean")


def parameters_over_epochs(task: Task) -> Picture:
    """Trained parameters at the start and after every epoch, of the first seed of each row."""

    def draw(axes: Axes) -> None:
        for place, (row, look) in enumerate(zip(task.rows, looks(task), strict=True)):
            counts = [row.runs[0].result["trainable_parameters_start"], *row.runs[0].history("trainable_parameters")]
            thick = 1.8 + 4 * (1 - place / len(task.rows))  # of lines that lie on each other the earlier show as edges
            dash = (0, tuple(step * 1.6 / thick for step in look.dash)) if look.dash else "-"
            axes.plot(range(len(counts)), counts, color=look.colour, linewidth=thick, linestyle=dash, solid_capstyle="butt")
        axes.set_title("trained parameters")
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(EngFormatter())
        _over_epochs(axes, task)

    return panel(draw, "trained parameters at the start and after every epoch")


def training_bytes(task: Task) -> Picture:
    """Counted bytes of a training, stacked by what they are for."""

    def draw(axes: Axes) -> None:
        rows, left = task.rows[::-1], np.zeros(len(task.rows))
        for part, colour in BYTES.items():
            sizes = np.array([np.median([run.result["bytes"][part] for run in row.runs]) for row in rows]) / 2**20
            axes.barh(range(len(rows)), sizes, left=left, height=0.62, color=colour, label=part.replace("_", " "))
            left += sizes
        axes.set_yticks(range(len(rows)), [row.name if len(row.name) <= 28 else f"{row.name[:27]}…" for row in rows])
        axes.set_ylim(len(rows) - 0.5 - max(len(rows), 5), len(rows) - 0.5)
        axes.grid(axis="y", visible=False)
        axes.set_title("counted bytes while training, MiB")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=4, frameon=False, fontsize=7.5, handlelength=1)

    return panel(draw, "bytes of parameters, gradients, optimizer state and saved tensors")


def block_map(name: str, mask: np.ndarray, block: str) -> Picture:
    """A layer's blocks, live ones dark; every block is a whole number of pixels in each direction, none is smoothed."""
    size = BlockSize.parse(block)
    shape = (min(4, -(-size.rows // size.cols)), min(4, -(-size.cols // size.rows)))  # a block's proportions, up to 4 to 1
    scale = max(1, min(350 // (mask.shape[1] * shape[1]), 16 // max(shape)))
    height, width = (side * scale for side in shape)
    pixels = np.kron(mask.astype(np.uint8) + 1, np.ones((height, width), np.uint8))
    if min(height, width) >= 4:  # room for lines between the blocks
        pixels[height - 1 :: height] = pixels[:, width - 1 :: width] = 0
    file = io.BytesIO()
    colours = ListedColormap([GROUND, "#dfe3e8", INK])
    matplotlib.image.imsave(file, pixels, cmap=colours, vmin=0, vmax=2, format="png", metadata=dict[str, Any](Software=None))
    return Picture(_data_uri("png", file.getvalue()), f"live blocks of layer {name}", pixels.shape[1], pixels.shape[0])
