"""Compare trainings: a row has those that differ in the seed only, and a task has the rows that may be compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from kronblocks.config.methods import METHODS
from kronblocks.core.blocks import BlockSize
from kronblocks.search.report import SearchReport
from kronblocks_lab.report.costs import COSTS, HEADLINE, Cost, short
from kronblocks_lab.report.measures import ACCURACY, LOSS, measure_of
from kronblocks_lab.report.results import Run
from kronblocks_lab.training.recipes import has_setting


class Row:
    """Trainings that differ in the seed only. A seed that was run twice counts once, with its mean."""

    def __init__(self, name: str, runs: Sequence[Run]) -> None:
        self.name, self.runs, self.method = name, tuple(runs), runs[0].method
        self.seeds = sorted({run.seed for run in runs})
        self.measure = measure_of(runs[0].config)
        values = [statistics.fmean(self.measure.of(run.result) for run in runs if run.seed == seed) for seed in self.seeds]
        self.quality = statistics.fmean(values)
        self.spread = self.measure.spread(values)
        self.mean = self.measure.text(values)
        self.sparsity = statistics.fmean(run.result["block_sparsity"] for run in runs)
        self.live = statistics.median_low(run.result["live_blocks"] for run in runs)
        asked = runs[0].config["rank"]
        rank = f"rank {'by block size' if asked is None else asked}, " if has_setting(self.method, "rank") else ""
        self.about = "" if self.method == "dense" else f"{rank}target {100 * runs[0].config['sparsity']:g} %"
        if runs[0].result.get("budget") is not None:  # then sizes may differ
            self.about = ", ".join(part for part in (runs[0].size, self.about) if part)
        surgery = runs[0].result["surgery"]
        odd = [f"layer {e['name']} is left dense: {e['reason']}" for e in surgery["left_dense"]]
        odd += [f"layer {e['name']}: {e['note']}" for e in surgery["selected"] if e["note"]]
        self.odd_layers = "; ".join(odd) or "every layer is as it was asked for"

    def values(self, cost: Cost) -> list[float]:
        """The cost of every run."""
        return [float(cost.get(run.result)) for run in self.runs]

    def median(self, cost: Cost) -> float:
        """The middle of the costs."""
        return statistics.median(self.values(cost))

    def gap(self, dense: Row) -> str:
        """The measure above or below that of dense."""
        return self.measure.gap(self.quality, dense.quality)

    @property
    def remark(self) -> str:
        """Another form of the measure: the perplexity of a language model."""
        return f"perplexity {short(math.exp(self.quality))}" if self.measure is LOSS and self.quality < 100 else ""

    def complaints(self, dense: Row | None) -> list[str]:
        """Warnings about a row: worse than dense, target missed, losses that are not finite."""
        found = []
        if dense and self.method != "dense":
            measure = self.measure
            behind = measure.badness(self.quality) - measure.badness(dense.quality)
            if behind > 0:
                gap, remark = f"{self.gap(dense)} {measure.difference}", "; with one seed the spread is not known"
                if self.spread is not None and dense.spread is not None:
                    remark = "; within the spread" if behind <= self.spread + dense.spread else ""
                worse = f"{'Lower' if measure.more_is_better else 'Higher'} test {measure.name} than dense"
                found.append(f"{worse}: {self.mean} against {dense.mean} {measure.unit} ({gap}{remark}).")
            for cost in COSTS:
                found += cost.complaint(self.values(cost), dense.values(cost))
        for run in self.runs if self.method != "dense" else []:
            target, areas = run.config["sparsity"], [BlockSize.parse(e["block_size"]).area for e in run.result["layers"]]
            weights = sum(e["out_features"] * e["in_features"] for e in run.result["layers"])
            if not -1e-6 < run.result["block_sparsity"] - target < sum(areas) / max(weights, 1) + 1e-6:
                is_so = f"{100 * run.result['block_sparsity']:.2f} % of the weights in zero blocks, {100 * target:g} % wanted"
                found.append(f"Missed its target sparsity: {is_so} (seed {run.seed}).")
        return found + [f"Losses that are not finite: {r.bad_losses} (seed {r.seed})." for r in self.runs if r.bad_losses]


class Task:
    """Rows that may be compared: the same data, model, epochs and batch size."""

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        self.name, self.rows, self.measure = name, tuple(rows), rows[0].measure
        ranked = sorted(rows, key=lambda row: self.measure.badness(row.quality))
        self.dense = next((row for row in ranked if row.method == "dense"), None)
        self.sparse = [row for row in ranked if row.method != "dense"]  # the best first
        self.best = ranked[0].mean.split()[0]

    @property
    def searches(self) -> list[tuple[Run, SearchReport]]:
        """The block-size searches of its trainings."""
        return [(run, run.search) for row in self.rows for run in row.runs if run.search]

    def ratio(self, row: Row, cost: Cost) -> float | None:
        """A row's cost relative to dense; None where there is nothing to compare."""
        base = self.dense.median(cost) if self.dense and row is not self.dense else 0
        return row.median(cost) / base if base else None

    @property
    def summary(self) -> str:
        """The task in one sentence."""
        row = self.sparse[0] if self.sparse else self.rows[0]
        measure = self.measure
        text = f"{row.mean} {measure.unit} test {measure.name}" if measure is ACCURACY else f"test loss {row.mean} {measure.unit}"
        text += " (1 seed)" if row.spread is None else ""
        if not self.sparse:
            return f"dense: {text}; there is no sparse training to compare with it."
        several = len(self.sparse) > 1
        best, part = ("most accurate", "images") if measure is ACCURACY else ("best", "part")
        choice = f"The {best} of {len(self.sparse)} sparse settings on the test {part} is " if several else ""
        text = f"{choice}{row.name}, with {100 * row.sparsity:.1f} % of the weights in zero blocks: {text}"
        if not self.dense:
            return f"{text}; there is no dense training to compare it with."
        ratios = [(cost.name, r) for cost in HEADLINE if (r := self.ratio(row, cost)) is not None]
        costs = [f"{short(r)} {'of' if r < 0.995 else 'times'} the {name}" for name, r in ratios]
        unit = " %" if measure is ACCURACY else ""
        against = f"{self.dense.mean}{unit} dense ({row.gap(self.dense)} {measure.difference})"
        return f"{text} against {against}, {', '.join(costs)}."

    @property
    def notices(self) -> list[tuple[str, list[str]]]:
        """Warnings: their subjects and texts."""
        found = []
        if not self.dense:
            found.append(("No dense training", ["Nothing can be compared with dense: add one with --method dense."]))
        runs = [run for row in self.rows for run in row.runs]
        measured = conditions([run.result for run in runs])
        if uneven := ", ".join(name for name, values in measured.items() if len(values) > 1):
            found.append(("Unequal conditions", [f"Seconds and memory may not be comparable: {uneven} differ, see the setup."]))
        others = [clock["others"] for run in runs if (clock := run.result.get("clock")) and clock.get("quiet") is False]
        if others:
            used = "others used its processor" if None in others else f"others used up to {short(max(others))} processors"
            found.append(("A busy machine", [f"Seconds on the clock mean little: {used} in {len(others)} of the trainings."]))
        return found + [(row.name, lines) for row in self.rows if (lines := row.complaints(self.dense))]


def conditions(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The conditions that measurements depend on, and every value that each had."""
    since = {True: "the start of the training", False: "the start of the process"}
    each = [{"threads": r["threads"], "memory since": since[bool(r.get("peak_memory_exact"))], **r["versions"]} for r in results]
    return {name: sorted({str(other.get(name)) for other in each}) for one in each for name in one}


def compared(runs: Sequence[Run]) -> list[Task]:
    methods = ("dense", *METHODS)
    tasks: dict[str, dict[tuple[Any, ...], list[Run]]] = {}
    for run in runs:
        area = run.block.area if run.method != "dense" else 0
        key = ([*methods, run.method].index(run.method), area, run.label, tuple(sorted(run.settings.items())))
        tasks.setdefault(run.task, {}).setdefault(key, []).append(run)
    return [Task(name, list(_rows([groups[key] for key in sorted(groups)]))) for name, groups in sorted(tasks.items())]


def _rows(groups: Sequence[Sequence[Run]]) -> Iterator[Row]:
    """Rows with names that tell them apart: what differs between rows of one label is added."""
    for group in groups:
        others = [other[0].settings for other in groups if other[0].label == group[0].label]
        differ = [f"{name} {v}" for name, v in group[0].settings.items() if any(other.get(name) != v for other in others)]
        yield Row(", ".join([group[0].label, *differ]), sorted(group, key=lambda run: (run.seed, run.folder)))
