"""The costs of a training, and warnings where they are higher than dense's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

BYTES = {"parameters": "#1f3a5f", "gradients": "#4f7cac", "optimizer_state": "#9dbbd8", "saved_tensors": "#d5dbe3"}


class Cost(NamedTuple):
    """A cost of a training, and the warning if it is higher than dense's ("": none)."""

    name: str
    unit: str
    scale: float
    get: Callable[[dict[str, Any]], float]  # from a result
    more: str = ""
    measured: bool = False  # not counted

    def text(self, value: float) -> str:
        """The value in the cost's unit, without the unit."""
        return short(value / self.scale)

    def extent(self, values: Sequence[float]) -> str:
        """The least and the most, or the one value that both are."""
        low, high = self.text(min(values)), self.text(max(values))
        return low if low == high else f"{low}\N{EN DASH}{high}"

    def complaint(self, values: Sequence[float], dense: Sequence[float]) -> list[str]:
        """One sentence if the median is more than that of dense, else none."""
        middle, base, remark = median(values), median(dense), ""
        if not self.more or middle <= base:
            return []
        if min(len(values), len(dense)) > 1:
            if min(values) <= max(dense):
                remark = f"; within the spread, {self.extent(values)} and {self.extent(dense)}"
        elif self.measured:
            remark = "; with one run the spread is not known"
        times = f"{short(middle / base)} times" if base else "from nothing"
        return [f"{self.more} than dense: {self.text(middle)} against {self.text(base)} {self.unit} ({times}{remark})."]


def short(value: float) -> str:
    """About three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.{2 if value >= 0.1 else 3}f}"


def number(value: Any) -> float:
    """A number, NaN where there is none."""
    return float(value) if isinstance(value, int | float) else math.nan


PARAMETERS = Cost("trained parameters", "", 1, lambda r: r["trainable_parameters_max"])

AT_END = Cost("trained parameters at the end", "", 1, lambda r: r["trainable_parameters_end"])

MACS = Cost("training multiply-adds", "G", 1e9, lambda r: r["training_macs"], "More multiply-adds in training")

INFERENCE = Cost("inference multiply-adds", "M", 1e6, lambda r: r["inference_macs_per_sample"], "More multiply-adds in inference")

SECONDS = Cost("training seconds", "s", 1, lambda r: r["train_seconds"], "Slower", True)

MEMORY = Cost("peak memory", "MiB", 2**20, lambda r: r["peak_memory_bytes"], "More peak memory", True)

COUNTED_BYTES = Cost("counted bytes", "MiB", 2**20, lambda r: sum(r["bytes"][part] for part in BYTES))

HEADLINE = (PARAMETERS, MACS, SECONDS, MEMORY)

COSTS = (PARAMETERS, AT_END, MACS, INFERENCE, SECONDS, MEMORY, COUNTED_BYTES)
