"""Time to quality: what each method has reached at parts of dense's time, and when it reached dense's final quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from kronblocks_lab.report.costs import short
from kronblocks_lab.report.curves import (
    CPU_SECONDS,
    MACS,
    SECONDS,
    Axis,
    Curve,
    best_by,
    curve_of,
    first_reached,
)

if TYPE_CHECKING:
    from kronblocks_lab.report.comparison import Row, Task
    from kronblocks_lab.report.measures import Measure

SHARES = (0.25, 0.5, 1.0)
"""Of dense's time, at which methods are compared."""


def axis_of(results: Sequence[dict[str, Any]]) -> tuple[Axis, str]:
    """What the trainings can be compared by, and why, in words.

    Seconds on the clock count only where all trainings had the same processor to themselves. Of single threads the seconds of
    the processor take their place, else the multiply-adds.
    """
    clocks = [result.get("clock") or {} for result in results]
    kinds = {(result["versions"].get("processor"), clock.get("device")) for result, clock in zip(results, clocks, strict=True)}
    threads = sorted({result["threads"] for result in results})
    told = f"{' or '.join(map(str, threads))} thread{'' if threads == [1] else 's'}"
    instead = "Counted multiply-adds are shown instead. They are not time: sparse products reach less of a machine's speed."
    if len(kinds) > 1:
        return MACS, f"The trainings ran on different machines, so their seconds cannot be compared. {instead}"
    if len(threads) == 1 and all(clock.get("quiet") is True for clock in clocks):
        others = [clock["others"] for clock in clocks if clock["others"] is not None]
        had = f", of which others used {max(others):.2f} at most" if others else ""
        cores = clocks[0]["cores"]
        gpu = " Whether others used the GPU is not known." if clocks[0].get("device") == "cuda" else ""
        return SECONDS, f"Seconds on the clock: {told} on {cores} processors{had}.{gpu}"
    if len(threads) > 1:
        reason = f"The trainings had {told}, so their seconds cannot be compared."
    elif others := [clock["others"] for clock in clocks if clock.get("others") is not None]:
        reason = (
            f"Others used up to {short(max(others))} of {clocks[0]['cores']} processors, so seconds on the clock mean little."
        )
    else:
        reason = "Nothing tells whether the machine was idle, so seconds on the clock mean little."
    if threads == [1] and all(clock.get("device") == "cpu" for clock in clocks):
        return CPU_SECONDS, f"{reason} Seconds of the processor in each training's one thread are shown instead."
    return MACS, f"{reason} {instead}"


class Line(NamedTuple):
    """A row of a task, with the curves of its trainings that have some."""

    row: Row
    curves: tuple[Curve, ...]
    seeds: tuple[int, ...]  # of the curves' trainings


class TimeToQuality:
    """The curves of a task.

    Args:
        task: the trainings.
        axis: what passes; None: what `axis_of` finds.

    Attributes:
        axis: what they run over.
        note: why that, in words.
        counted: the same over counted multiply-adds; None where this is that.
        lines: a line for each row that has evaluations with times.
        target: dense's final quality on validation data, mean over its trainings; None without dense.
        whole: when dense ended, mean over its trainings, in the axis's unit.
    """

    def __init__(self, task: Task, axis: Axis | None = None) -> None:
        self.measure: Measure = task.measure
        found_axis, self.note = axis_of([run.result for row in task.rows for run in row.runs])
        self.axis = axis or found_axis
        self.counted = TimeToQuality(task, MACS) if self.axis is not MACS else None
        quality = f"validation_{self.measure.name}"
        self.lines: list[Line] = []
        for row in task.rows:
            found = [(curve, run.seed) for run in row.runs if (curve := curve_of(run.result, self.axis, quality))]
            if found:
                self.lines.append(Line(row, *zip(*found, strict=True)))
        dense = next((line for line in self.lines if line.row is task.dense), None)
        self.target = None if dense is None else statistics.fmean(map(self.final, dense.curves))
        if self.target is not None and not math.isfinite(self.target):
            self.target = dense = None  # there is nothing to reach
        self._targets: dict[int, list[float]] = {}
        for curve, seed in zip(dense.curves, dense.seeds, strict=True) if dense else ():
            self._targets.setdefault(seed, []).append(self.final(curve))
        self.whole = None if dense is None else statistics.fmean(curve.end for curve in dense.curves)

    def __bool__(self) -> bool:
        return bool(self.lines)

    @property
    def more(self) -> bool:
        """Whether more is better."""
        return self.measure.more_is_better

    def final(self, curve: Curve) -> float:
        """Quality at the end of a training; infinitely bad where it has diverged."""
        return curve.final if not curve.diverged else math.inf * (-1 if self.more else 1)

    def reached(self, line: Line) -> list[float | None]:
        """When each training reached dense's final quality: of the same seed where there is one, else the mean."""
        if self.target is None:
            return []
        targets = [statistics.fmean(self._targets.get(seed, [self.target])) for seed in line.seeds]
        pairs = zip(line.curves, targets, strict=True)
        return [first_reached(curve, target, more_is_better=self.more) for curve, target in pairs]

    def best(self, line: Line, share: float) -> list[float | None]:
        """The best quality of each training until a share of dense's time."""
        if self.whole is None:
            return []
        return [best_by(curve, share * self.whole, more_is_better=self.more) for curve in line.curves]

    @property
    def head(self) -> list[str]:
        """Columns of the table."""
        unit, measure = self.axis.unit, f"{self.measure.name}, {self.measure.unit}"
        until = [f"Best {measure}, at {100 * share:g} % of dense's time" for share in SHARES] if self.target is not None else []
        to_dense = [f"To dense's final {self.measure.name}, {unit}"] if self.target is not None else []
        return ["Method", f"Whole training, {unit}", f"Final {measure}", *to_dense, *until]

    @property
    def table(self) -> list[list[str]]:
        """Its rows: text, without units."""
        rows = []
        for line in self.lines:
            cells = [line.row.name, _over([curve.end for curve in line.curves])]
            cells.append(self.measure.text([self.final(curve) for curve in line.curves]))
            if self.whole is not None:
                cells.append(self._when(self.reached(line), self.whole))
                for share in SHARES:
                    values = [value for value in self.best(line, share) if value is not None]
                    cells.append(self.measure.text(values) if len(values) == len(line.curves) else "not yet")
            rows.append(cells)
        return rows

    @property
    def budget_head(self) -> list[str]:
        """Columns of the table of budgets."""
        return ["Method", "Budget, s", "Steps", "Timed before", "Expected, s", "Took, s"]

    @property
    def budgets(self) -> list[list[str]]:
        """What was asked for, what a short timing expected, and what it was; empty where no training had a budget."""
        rows = []
        for line in self.lines:
            found = [run.result for run in line.row.runs if run.result.get("budget")]
            if not found:
                continue
            each = [result["budget"] for result in found]
            key = "cpu_seconds" if each[0]["clock"] == "cpu" else "seconds"
            timed = f"{_over([b['timing_seconds'] for b in each])} s, {each[0]['timed_steps']} steps"
            asked = f"{each[0]['seconds']:g}{' of the processor' if key == 'cpu_seconds' else ''}"
            took = [_over([b["estimated_seconds"] for b in each]), _over([r["clock"][key] for r in found])]
            rows.append([line.row.name, asked, _over([b["steps"] for b in each]), timed, *took])
        return rows

    def _when(self, times: list[float | None], whole: float) -> str:
        found = [time for time in times if time is not None]
        if not found:
            return "not reached"
        text = f"{_over(found)}, {short(statistics.fmean(found) / whole)}\N{MULTIPLICATION SIGN}"
        return text if len(found) == len(times) else f"{text}, in {len(found)} of {len(times)} trainings, else not reached"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for curves.json."""
        lines = []
        for line in self.lines:
            run = line.row.runs[0]
            best = {f"{100 * share:g}": self.best(line, share) for share in SHARES} if self.whole is not None else {}
            lines.append(
                {
                    "name": line.row.name,
                    "about": line.row.about,
                    "method": line.row.method,
                    "seeds": list(line.seeds),
                    "sparsity": line.row.sparsity,
                    "x": [[round(float(x), 6) for x in curve.x] for curve in line.curves],
                    "y": [[round(float(y), 6) for y in curve.y] for curve in line.curves],
                    "sparse_from": [curve.from_ for curve in line.curves],
                    "reached": self.reached(line),
                    "best": best,
                    "test": [run.result.get(f"test_{self.measure.name}") for run in line.row.runs],
                    "clocks": [run.result.get("clock") for run in line.row.runs],
                    "budgets": [run.result.get("budget") for run in line.row.runs],
                    "settings": run.settings,
                    "threads": run.result["threads"],
                    "versions": run.result["versions"],
                    "source": run.result.get("source"),
                }
            )
        return {
            "axis": self.axis.key,
            "note": self.note,
            "measure": self.measure.name,
            "target": self.target,
            "whole": self.whole,
            "head": self.head,
            "table": self.table,
            "lines": lines,
        }


def _over(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    spread = f" ± {short(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{short(statistics.fmean(values))}{spread}"
