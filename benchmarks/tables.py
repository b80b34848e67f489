"""Write the tables and the figure of the docs from benchmarks/results: `python benchmarks/tables.py`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kronblocks.experiments.bench.page import summary
from kronblocks.files import read_json, write_text

ROOT = Path(__file__).parent.parent


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _label(entry: dict[str, Any]) -> str:
    return entry["method"] if entry["block_size"] is None else f"{entry['method']} {entry['block_size']}x{entry['block_size']}"


def _column(entry: dict[str, Any], name: str, scale: float = 1.0) -> list[float]:
    return [run[name] * scale for run in entry["runs"]]


def _ratio(entry: dict[str, Any], dense: dict[str, Any], name: str) -> str:
    return f"{statistics.mean(_column(entry, name)) / statistics.mean(_column(dense, name)):.2f}"


def accuracy_table(results: dict[str, Any]) -> str:
    """One row a method and block size; costs relative to dense."""
    entries = results["entries"]
    dense = next(entry for entry in entries if entry["method"] == "dense")
    config, versions = dense["config"], dense["versions"]
    widths = "-".join(map(str, config["widths"]))
    lines = [
        "| method | test accuracy % | weights in zero blocks % | trained parameters, most | at the end | training multiply-adds |"
        " rate, of |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [
            _label(entry),
            _spread(_column(entry, "test_accuracy", 100)),
            f"{statistics.mean(_column(entry, 'block_sparsity', 100)):.2f}",
            _ratio(entry, dense, "trainable_parameters_max"),
            _ratio(entry, dense, "trainable_parameters_end"),
            _ratio(entry, dense, "training_macs"),
            f"{entry['rate']:g}, of {' '.join(entry['validation_accuracy_by_rate'])}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    seeds = len(dense["runs"])
    lines += [
        "",
        f"{config['data']}, MLP with hidden layers {widths}, {config['epochs']} epochs, batch {config['batch_size']}, mean ± "
        f"standard deviation of {seeds} seeds;",
        "parameters and multiply-adds relative to dense; every method's learning rate chosen on validation, of those in the last "
        f"column; torch {versions['torch']}.",
    ]
    return "\n".join(lines)


def accuracy_figure(results: dict[str, Any], path: Path) -> None:
    """Test accuracy against the most parameters ever trained."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"dense": "#444444", "two-phase": "#0072b2", "kron-l1": "#d55e00", "magnitude": "#009e73", "group-lasso": "#cc79a7"}
    for entry in results["entries"]:
        accuracy = _column(entry, "test_accuracy", 100)
        most = statistics.mean(_column(entry, "trainable_parameters_max"))
        colour = colours.get(entry["method"], "#999999")
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        marker = {None: "s", "4": "o", "16": "D"}.get(entry["block_size"], "^")
        axes.errorbar(most, statistics.mean(accuracy), yerr=spread, fmt=marker, color=colour, capsize=3)
        axes.annotate(_label(entry), (most, statistics.mean(accuracy)), xytext=(8, -12), textcoords="offset points", color=colour)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 1.6)
    axes.set_xlabel("most parameters trained at any time")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Fashion-MNIST, {100 * results['sparsity']:.0f}% of the weights in zero blocks", loc="left", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def fill(page: Path, name: str, table: str) -> None:
    """Put a table between its markers in a page."""
    text = page.read_text()
    begin, end = f"<!-- begin table: {name} -->", f"<!-- end table: {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{page} has no place for the table {name!r}: write {begin} and {end} where it belongs")
    write_text(page, pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text))


def main() -> None:
    """All tables and figures."""
    accuracy = read_json(ROOT / "benchmarks/results/accuracy.json")
    fill(ROOT / "README.md", "accuracy", accuracy_table(accuracy))
    fill(ROOT / "README.md", "speed", "\n".join(summary(ROOT / "benchmarks/results")))
    accuracy_figure(accuracy, ROOT / "docs/figures/accuracy.png")


if __name__ == "__main__":
    main()
