"""What trainings are compared by: the accuracy of classifiers, the loss of language models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from kronblocks_lab.report.costs import number

_MINUS = "\N{MINUS SIGN}"


class Measure(NamedTuple):
    """How good a trained model is."""

    name: str  # in results after "test_" and "validation_"
    unit: str
    scale: float  # of a result in that unit
    digits: int
    difference: str  # unit of differences
    more_is_better: bool

    @property
    def title(self) -> str:
        """Of a column.

        >>> LOSS.title
        'Test loss, nats per character'
        """
        return f"Test {self.name}, {self.unit}"

    def of(self, result: dict[str, Any]) -> float:
        """The test part's, from a result.json; infinitely bad where it is not finite."""
        value = number(result.get(f"test_{self.name}"))
        return value if math.isfinite(value) else math.inf * (-1 if self.more_is_better else 1)

    def found(self, row: dict[str, Any], part: str = "test") -> float:
        """A part's, from what is kept of a result, in the measure's unit; infinitely bad where there is none."""
        value = row[f"{part}_{self.name}"]
        return self.scale * (math.inf * (-1 if self.more_is_better else 1) if value is None else value)

    def badness(self, value: float) -> float:
        """What is smallest for the best."""
        return -value if self.more_is_better else value

    def text(self, values: Sequence[float]) -> str:
        """Mean and standard deviation, in the unit and without it.

        >>> ACCURACY.text([0.5, 0.75])
        '62.50 ± 17.68'
        """
        spread = self.spread(values)
        return self._number(fmean(values)) + ("" if spread is None else f" ± {self._number(spread)}")

    def spread(self, values: Sequence[float]) -> float | None:
        """Standard deviation of a sample; None of one value, or where some are not finite."""
        return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None

    def gap(self, own: float, other: float) -> str:
        """A difference with its sign.

        >>> ACCURACY.gap(0.75, 0.5), LOSS.gap(1.5, 1.75)
        ('+25.00', '−0.2500')
        """
        return f"{self.scale * (own - other):+.{self.digits}f}".replace("-", _MINUS)

    def _number(self, value: float) -> str:
        return f"{self.scale * value:.{self.digits}f}"


ACCURACY = Measure("accuracy", "%", 100.0, 2, "points", True)

LOSS = Measure("loss", "nats per character", 1.0, 4, "nats", False)


def measure_of(config: dict[str, Any]) -> Measure:
    """The measure of a training with these settings."""
    return LOSS if config["data"] == "text" else ACCURACY
