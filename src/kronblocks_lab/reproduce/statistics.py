"""Means, spreads and paired differences of a study's trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import scipy.stats

from kronblocks.config.methods import spec_of
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.measure.results import Row
from kronblocks_lab.report.measures import ACCURACY, Measure

OURS = "two-phase"
Part = Literal["test", "validation"]


class Difference(NamedTuple):
    """A paired difference of means with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float
    digits: int = 2

    def __str__(self) -> str:
        mean, low, high = (f"{value:+.{self.digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean} ({low} to {high})"


def paired(ours: Sequence[float], theirs: Sequence[float], digits: int = 2) -> Difference:
    """Mean of the differences of pairs, and the 95% interval that their spread gives.

    >>> paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).mean
    2.0
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, -math.inf, math.inf, digits)
    half = float(scipy.stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half, digits)


class CellResult:
    """The compared trainings of one cell, by seed, beside dense ones of the same seeds.

    Args:
        rows: of the cell.
        dense: of dense.
        measure: what they are compared by.
    """

    def __init__(self, rows: Sequence[Row], dense: Sequence[Row], measure: Measure = ACCURACY) -> None:
        self.measure = measure
        self.rows = sorted(rows, key=lambda row: row["seed"])
        first = self.rows[0]
        self.method, self.block, self.sparsity, self.trial = (first[n] for n in ("method", "block", "sparsity", "trial"))
        self._dense = {row["seed"]: row for row in dense}

    def by_seed(self, part: Part = "test") -> dict[int, float]:
        """The measure of the test or the validation part, in its unit."""
        return {row["seed"]: self.measure.found(row, part) for row in self.rows}

    def spread_of(self, part: Part = "test") -> str:
        """Mean and standard deviation between seeds of the measure."""
        values, digits = list(self.by_seed(part).values()), self.measure.digits
        return f"{statistics.fmean(values):.{digits}f}" + (f" ± {self._deviation(values):.{digits}f}" if len(values) > 1 else "")

    @property
    def quality(self) -> float:
        """Mean of the measure on the test part, in its unit."""
        return statistics.fmean(self.by_seed().values())

    @property
    def spread(self) -> float:
        """Standard deviation of that between seeds; 0 for one seed."""
        return self._deviation(list(self.by_seed().values()))

    @staticmethod
    def _deviation(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0

    def mean(self, name: str) -> float:
        """Mean of a measured number; NaN where a row lacks it."""
        return statistics.fmean(math.nan if row[name] is None else row[name] for row in self.rows)

    def to_dense(self, *names: str) -> float:
        """Ratio to dense of means, of one measured number or the sum of several; NaN where dense was not run."""
        dense = [sum(row[name] for name in names) for row in self._dense.values()]
        return sum(self.mean(name) for name in names) / statistics.fmean(dense) if dense else math.nan

    def against(self, other: CellResult, part: Part = "test") -> Difference:
        """The measure minus that of another cell, over the seeds that both have."""
        own, theirs = self.by_seed(part), other.by_seed(part)
        shared = [seed for seed in own if seed in theirs]
        return paired([own[seed] for seed in shared], [theirs[seed] for seed in shared], self.measure.digits)

    def summary(self, part: Part = "test") -> tuple[str, ...]:
        """Cells of a row for the screen."""
        dense = CellResult(list(self._dense.values()), [], self.measure) if self._dense else None
        shared = self._dense.keys() & self.by_seed().keys()
        gap = self.against(dense, part) if dense is not None and shared else None
        return (
            self.method,
            self.block,
            f"{100 * self.mean('block_sparsity'):.2f}" if self.block else "",
            self.spread_of(part),
            "" if gap is None else str(gap),
            f"{self.to_dense('training_macs'):.2f}",
        )


def at(found: Sequence[CellResult], method: str, block: str, sparsity: float) -> CellResult:
    """The cell of a method at a place; dense has one for all.

    Raises:
        KronblocksError: it was not run there.
    """
    place = ("", 0.0) if method == "dense" else (block, sparsity)
    for cell in found:
        if (cell.method, cell.block, cell.sparsity) == (method, *place):
            return cell
    raise KronblocksError(f"{method} was not run with blocks of {block} at {100 * sparsity:g}%: run kronblocks reproduce mlp")


def stale(rows: Iterable[Row]) -> list[str]:
    """The methods of which rows are of an earlier revision."""
    return list(dict.fromkeys(row["method"] for row in rows if row["revision"] != spec_of(row["method"]).revision))


def cells(rows: Sequence[Row], measure: Measure = ACCURACY) -> list[CellResult]:
    """The compared cells of a study: by sparsity, block size, method and settings, in the order in which they came."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["part"] == "compare":
            groups.setdefault((row["sparsity"], row["block"], row["method"], row["trial"]), []).append(row)
    dense = [row for key, group in groups.items() if key[2] == "dense" for row in group]
    return [CellResult(group, dense, measure) for group in groups.values()]
