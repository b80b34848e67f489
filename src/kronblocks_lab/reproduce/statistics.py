"""Means, spreads and paired differences of a study's trainings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import scipy.stats

from kronblocks.config.methods import spec_of
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.bench.measure.results import Row

OURS = "two-phase"


class Difference(NamedTuple):
    """A paired difference of means with its 95% interval (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of the differences of pairs, and the 95% interval that their spread gives.

    >>> paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]).mean
    2.0
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, -math.inf, math.inf)
    half = float(scipy.stats.t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, mean - half, mean + half)


class CellResult:
    """The compared trainings of one cell, by seed, beside dense ones of the same seeds."""

    def __init__(self, rows: Sequence[Row], dense: Sequence[Row]) -> None:
        self.rows = sorted(rows, key=lambda row: row["seed"])
        first = self.rows[0]
        self.method, self.block, self.sparsity, self.trial = (first[n] for n in ("method", "block", "sparsity", "trial"))
        self._dense = {row["seed"]: row for row in dense}

    def percent(self, name: str) -> dict[int, float]:
        """A measured share in percent, by seed."""
        return {row["seed"]: 100 * row[name] for row in self.rows}

    def spread_of(self, name: str) -> str:
        """Mean and standard deviation between seeds of a measured share, in percent."""
        values = list(self.percent(name).values())
        return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    @property
    def accuracy(self) -> float:
        """Mean test accuracy in percent."""
        return statistics.fmean(self.percent("test_accuracy").values())

    @property
    def spread(self) -> float:
        """Standard deviation of the test accuracy between seeds, in percent; 0 for one seed."""
        values = list(self.percent("test_accuracy").values())
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def mean(self, name: str) -> float:
        """Mean of a measured number; NaN where a row lacks it."""
        return statistics.fmean(math.nan if row[name] is None else row[name] for row in self.rows)

    def to_dense(self, *names: str) -> float:
        """Ratio to dense of means, of one measured number or the sum of several; NaN where dense was not run."""
        dense = [sum(row[name] for name in names) for row in self._dense.values()]
        return sum(self.mean(name) for name in names) / statistics.fmean(dense) if dense else math.nan

    def against(self, other: CellResult, name: str = "test_accuracy") -> Difference:
        """Test accuracy, or another share, minus that of another cell, over the seeds that both have."""
        own, theirs = self.percent(name), other.percent(name)
        shared = [seed for seed in own if seed in theirs]
        return paired([own[seed] for seed in shared], [theirs[seed] for seed in shared])

    def summary(self, name: str = "test_accuracy") -> tuple[str, ...]:
        """Cells of a row for the screen."""
        dense = {seed: 100 * row[name] for seed, row in self._dense.items()}
        own = {seed: value for seed, value in self.percent(name).items() if seed in dense}
        gap = paired(list(own.values()), [dense[seed] for seed in own]) if own else None
        return (
            self.method,
            self.block,
            f"{100 * self.mean('block_sparsity'):.2f}" if self.block else "",
            self.spread_of(name),
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


def cells(rows: Sequence[Row]) -> list[CellResult]:
    """The compared cells of a study: by sparsity, block size, method and settings, in the order in which they came."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["part"] == "compare":
            groups.setdefault((row["sparsity"], row["block"], row["method"], row["trial"]), []).append(row)
    dense = [row for key, group in groups.items() if key[2] == "dense" for row in group]
    return [CellResult(group, dense) for group in groups.values()]
