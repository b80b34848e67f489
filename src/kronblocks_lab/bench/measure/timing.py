"""Time several ways of doing one thing side by side: interleaved, in one process, medians of repeats with their spread."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from kronblocks_lab.bench.measure.results import Row, significant

TIMES = ("ms", "ms_low", "ms_high", "dense_ms", "speed", "speed_low", "speed_high")
"""Columns of a timed row."""

SAMPLE_SECONDS = 1e-4  # shorter calls are timed several at a time, so that reading the clock does not count
_ROUNDS = 5  # visits to each case in a repeat, at most


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: a median for each repeat."""

    repeats: tuple[float, ...]
    calls: int  # timed, over all repeats

    @property
    def ms(self) -> float:
        """Median of the repeats' medians."""
        return statistics.median(self.repeats)

    @property
    def spread(self) -> tuple[float, float]:
        """Least and greatest median of a repeat."""
        return min(self.repeats), max(self.repeats)

    def speed_to(self, reference: Timing) -> tuple[float, float, float]:
        """How many times as fast as a reference of the same run: of the medians, and least and greatest of a repeat."""
        each = [base / own for base, own in zip(reference.repeats, self.repeats, strict=True)]
        return reference.ms / self.ms, min(each), max(each)

    def row(self, dense: Timing) -> Row:
        """`TIMES`, beside the time of dense in the same run."""
        values = (self.ms, *self.spread, dense.ms, *self.speed_to(dense))
        return dict(zip(TIMES, map(significant, values), strict=True))


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Args:
        seconds: of measuring per case and repeat; a call that takes longer is made once a repeat.
        repeats: independent repeats, each with a median of its own.
    """

    seconds: float = 0.04
    repeats: int = 3


class _Plan:
    """How one case is timed: in how many of a repeat's rounds, how many samples each, how many calls a sample."""

    def __init__(self, estimate: float, seconds: float, sample_seconds: float) -> None:
        estimate = max(estimate, 1e-9)
        self.visits = min(_ROUNDS, max(1, math.ceil(seconds / estimate)))
        self.calls = max(1, math.ceil(sample_seconds / estimate))
        self.samples = max(1, round(seconds / self.visits / (self.calls * estimate)))

    def takes_part(self, round_number: int) -> bool:
        """Visits are spread evenly over the rounds."""
        return round_number * self.visits % _ROUNDS < self.visits


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until a device has done all that it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _elapsed(run: Callable[[], object], calls: int, clock: Callable[[], float], wait: Callable[[], None]) -> float:
    """Seconds of one call, averaged over `calls`."""
    start = clock()
    for _ in range(calls):
        run()
    wait()
    return (clock() - start) / calls


def measure(
    cases: Mapping[str, Callable[[], object]],
    budget: Budget,
    *,
    seed: int = 0,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time all cases in turns, after two warm-up calls each; a case comes up to five times a repeat, in shuffled order.

    Args:
        cases: what to call, by name.
        budget: how long to measure.
        seed: of the order.
        device: "cpu", or "cuda", whose work is waited for.
        clock: seconds, rising.
    """
    wait, order = synchroniser(device), random.Random(seed)
    sample_seconds = SAMPLE_SECONDS if device == "cpu" else 20 * SAMPLE_SECONDS
    plans: dict[str, _Plan] = {}
    for name, run in cases.items():
        wait()
        first = _elapsed(run, 1, clock, wait)
        again = first < 5 * budget.seconds  # the second call is warm; a slow one's first call says enough
        plans[name] = _Plan(_elapsed(run, 1, clock, wait) if again else first, budget.seconds, sample_seconds)
    medians: dict[str, list[float]] = {name: [] for name in cases}
    calls = dict.fromkeys(cases, 0)
    collected = gc.isenabled()
    gc.disable()
    try:
        for _ in range(budget.repeats):
            samples: dict[str, list[float]] = {name: [] for name in cases}
            for round_number in range(_ROUNDS):
                turns = [name for name in cases if plans[name].takes_part(round_number)]
                for name in order.sample(turns, len(turns)):
                    plan = plans[name]
                    samples[name] += [_elapsed(cases[name], plan.calls, clock, wait) for _ in range(plan.samples)]
                    calls[name] += plan.calls * plan.samples
            for name, values in samples.items():
                medians[name].append(1e3 * statistics.median(values))
    finally:
        if collected:
            gc.enable()
    return {name: Timing(tuple(values), calls[name]) for name, values in medians.items()}
