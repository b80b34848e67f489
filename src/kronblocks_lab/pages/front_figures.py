"""The pictures of README and of the site's first page, as SVG for light and for dark pages.

Texts stay texts, so that readers can select them and tests can read them.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from kronblocks.core.files import write_text

FONTS = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
WIDTH = 6.4  # inches of 96 CSS pixels at 72 points: 614 pixels, and text of 13 points is 10 pixels on a phone


class Theme(NamedTuple):
    """The colours of a page."""

    name: str
    ink: str
    soft: str
    faint: str
    ground: str  # of zero blocks
    ours: str
    good: str
    negative: str
    middle: str


THEMES = (
    Theme("light", "#1f2328", "#59636e", "#d1d9e0", "#f0f2f5", "#0969a8", "#0a7f5a", "#c2541b", "#ffffff"),
    Theme("dark", "#e6edf3", "#9aa4af", "#3d444d", "#262c35", "#58b1f0", "#3fbf8f", "#f08a4b", "#171c24"),
)


class Line(NamedTuple):
    """Accuracies of one method, in percent, by sparsity."""

    name: str
    points: dict[float, float]


class Bar(NamedTuple):
    """How many times as fast as dense: the lowest and the highest over machines."""

    name: str
    low: float
    high: float
    inference: bool = False


@contextmanager
def themed_figure(path: Path, theme: Theme, height: float) -> Iterator[Figure]:
    """A figure that is written when all is drawn."""
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), theme.ink)
    colours |= dict.fromkeys(("xtick.color", "ytick.color"), theme.soft)
    settings: dict[Any, Any] = {
        **{"svg.fonttype": "none", "svg.hashsalt": "kronblocks", "font.family": ["DejaVu Sans"], "font.size": 13},
        **{"axes.edgecolor": theme.faint, "axes.facecolor": "none", "figure.facecolor": "none"},
        **{"axes.titlelocation": "left", "axes.titlesize": 14, "axes.titleweight": "bold", "grid.color": theme.faint},
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        **colours,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height))
        yield figure
        file = io.StringIO()
        figure.set_dpi(72)
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace("'DejaVu Sans', sans-serif", FONTS).replace("'DejaVu Sans'", FONTS)
    write_text(path.with_name(f"{path.name}-{theme.name}.svg"), "\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def apart(values: Sequence[float], least: float) -> list[float]:
    """Places for labels near these values, at least so far from each other; values come from high to low.

    >>> apart([3.0, 2.9, 1.0], 0.5)
    [3.2, 2.7, 1.0]
    """
    groups: list[list[float]] = []  # of labels that would touch: the mean of their values, and how many
    for value in values:
        groups.append([value, 1])
        while len(groups) > 1 and groups[-2][0] - groups[-1][0] < least * (groups[-2][1] + groups[-1][1]) / 2:
            mean, count = groups.pop()
            above, number = groups.pop()
            groups.append([(mean * count + above * number) / (count + number), count + number])
    return [round(mean + least * ((count - 1) / 2 - place), 9) for mean, count in groups for place in range(int(count))]


def accuracy(path: Path, title: str, dense: float, lines: Sequence[Line], ours: str) -> None:
    """Test accuracy against the share of zeros, a line for each method, named at its end."""
    shares = sorted({share for line in lines for share in line.points})
    last = shares[-1]
    ordered = sorted(lines, key=lambda line: -line.points[last])
    places = apart([line.points[last] for line in ordered], 0.36)
    for theme in THEMES:
        with themed_figure(path, theme, 4.9) as figure:
            axes = figure.add_axes((0.1, 0.125, 0.545, 0.79))
            axes.set_title(title, x=-0.17, pad=12)
            axes.plot([-0.15, 3.12], [dense, dense], color=theme.soft, linewidth=1.4, linestyle=(0, (4, 3)))
            axes.annotate(f"dense {dense:.1f}", (3.22, dense), va="center", color=theme.soft, annotation_clip=False)
            for line, place in zip(ordered, places, strict=True):
                own = line.name == ours
                colour, width = (theme.ours, 3.2) if own else (theme.soft, 1.3)
                values = [line.points[share] for share in shares]
                axes.plot(values, color=colour, linewidth=width, marker="o", markersize=7 if own else 4, zorder=3 if own else 2)
                label = f"{line.name} {values[-1]:.1f}"
                weight = "bold" if own else "normal"
                link = {"arrowstyle": "-", "color": theme.faint, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 5, "relpos": (0, 0.5)}
                axes.annotate(
                    label,
                    (3, values[-1]),
                    xytext=(3.22, place),
                    va="center",
                    color=colour,
                    fontweight=weight,
                    arrowprops=link,
                    annotation_clip=False,
                )
            axes.set_xlim(-0.15, 3.1)
            axes.set_xticks(range(len(shares)), [f"{100 * share:g}%" for share in shares])
            axes.set_xlabel("weights in zero blocks")
            axes.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(1))
            axes.yaxis.set_major_formatter("{x:.0f}%")
            axes.grid(axis="y", alpha=0.6, linewidth=0.8)
            axes.tick_params(length=0)


def times(value: float) -> str:
    """A ratio with two digits.

    >>> times(12.06), times(3.619), times(0.986)
    ('12x', '3.6x', '0.99x')
    """
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 0.995 else f"{value:.2f}x"


def between(bar: Bar) -> str:
    """The range of a bar in words."""
    low, high = times(bar.low), times(bar.high)
    return low if low == high else f"{low.removesuffix('x')} to {high}"


def speed(path: Path, title: str, bars: Sequence[Bar]) -> None:
    """A bar for each case: solid to the lowest ratio over machines, faint to the highest."""
    for theme in THEMES:
        with themed_figure(path, theme, 0.75 + 0.62 * len(bars)) as figure:
            axes = figure.add_axes((0.01, 0.06, 0.98, 0.87))
            axes.set_title(title, pad=8)
            most = max(bar.high for bar in bars)
            axes.set_xlim(0, 1.17 * most)
            axes.set_ylim(len(bars) - 0.35, -0.6)
            for number, bar in enumerate(bars):
                colour = theme.good if bar.inference else theme.ours
                axes.barh(number + 0.16, bar.high, color=colour, alpha=0.35, height=0.36)
                axes.barh(number + 0.16, bar.low, color=colour, height=0.36)
                axes.plot([1, 1], [number - 0.06, number + 0.38], color=theme.ink, linewidth=1.4)
                axes.annotate(bar.name, (0, number - 0.24), va="center")
                at: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
                label = (max(bar.high, 1.0), number + 0.16)
                axes.annotate(between(bar), label, color=colour, fontweight="bold", **at)
            ticks = range(4, int(most) + 1, 2)
            axes.set_xticks([1, *ticks], ["dense", *(f"{tick}x" for tick in ticks)])
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0)


class Example(NamedTuple):
    """A small matrix in the states of a training, NaN where blocks are zero."""

    tiles: np.ndarray
    factors: np.ndarray
    live: np.ndarray
    lifted: np.ndarray


def example(blocks: int = 6, side: int = 4, rank: int = 2, keep: int = 9) -> Example:
    """Made with a fixed seed: W = sum_i A_i kron B_i, its blocks of greatest norm, and those after some free training."""
    random = np.random.default_rng(3)
    tiles = random.standard_normal((rank, side, side))
    coeff = random.standard_normal((rank, blocks, blocks)) * random.uniform(0.2, 1.5, (blocks, blocks))
    weight = sum(np.kron(a, b) for a, b in zip(coeff, tiles, strict=True))
    weight = np.asarray(weight) / np.abs(weight).max()
    weight = np.sign(weight) * np.abs(weight) ** 0.7  # so that weak blocks can be seen
    norms = np.linalg.norm(weight.reshape(blocks, side, blocks, side), axis=(1, 3))
    mask = norms >= np.sort(norms.ravel())[-keep]
    dead = np.kron(~mask, np.ones((side, side), bool))
    lifted = np.clip(weight + 0.45 * random.standard_normal(weight.shape), -1, 1)
    return Example(tiles, weight, np.where(dead, np.nan, weight), np.where(dead, np.nan, lifted))


HEIGHT = 3.65


def how_it_works(path: Path) -> None:
    """Factors, live blocks, lifted blocks, with the numbers that are trained in each."""
    shown = example()
    side, blocks = shown.tiles.shape[1], shown.factors.shape[0] // shown.tiles.shape[1]
    live = int((~np.isnan(shown.lifted)).sum())
    factors = shown.tiles.size + len(shown.tiles) * blocks**2
    kept = shown.tiles.size + len(shown.tiles) * live // side**2
    panels = (
        ("1  Factors", shown.factors, ("all blocks mix", f"{len(shown.tiles)} shared tiles"), factors),
        ("2  Live blocks", shown.live, ("weak blocks die,", f"{live // side**2} of {blocks**2} live"), kept),
        ("3  Lifted", shown.lifted, ("live blocks train", "weight by weight"), live),
    )
    for theme in THEMES:
        colours = LinearSegmentedColormap.from_list("weights", [theme.negative, theme.middle, theme.ours])
        colours.set_bad(theme.ground)
        with themed_figure(path, theme, HEIGHT) as figure:
            for number, (title, weight, words, count) in enumerate(panels):
                axes = figure.add_axes((left := 0.005 + 0.347 * number, 0.385, 0.296, 0.296 * WIDTH / HEIGHT))
                _matrix(axes, weight, colours, theme, side)
                axes.set_title(title, pad=7)
                for place, text in enumerate(words):
                    figure.text(left, 0.3 - 0.072 * place, text, color=theme.soft)
                figure.text(left, 0.125, f"{count} numbers", color=theme.ours, fontweight="bold")
                if number:
                    arrow = {"arrowstyle": "-|>", "color": theme.soft, "linewidth": 1.4, "mutation_scale": 13}
                    axes.annotate("", (-0.02, 0.5), xytext=(-0.16, 0.5), xycoords="axes fraction", arrowprops=arrow)
            for number, tile in enumerate(shown.tiles):
                small = figure.add_axes((0.212 + 0.05 * number, 0.215, 0.042, 0.042 * WIDTH / HEIGHT))
                _matrix(small, tile / np.abs(tile).max(), colours, theme, side)
            size = "x".join(map(str, shown.factors.shape))
            told = f"The same {size} matrix, dense: {shown.factors.size} numbers"
            figure.text(0.005, 0.022, told, color=theme.soft)


def _matrix(axes: Axes, weight: np.ndarray, colours: LinearSegmentedColormap, theme: Theme, side: int) -> None:
    """Weights as pixels; lines between blocks."""
    pixels = np.kron(weight, np.ones((8, 8)))
    axes.imshow(pixels, cmap=colours, vmin=-1, vmax=1, interpolation="nearest", extent=(0, len(weight), len(weight), 0))
    for place in range(0, len(weight) + 1, side):
        axes.axhline(place, color=theme.middle, linewidth=1.6)
        axes.axvline(place, color=theme.middle, linewidth=1.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
