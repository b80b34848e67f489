"""Interleaving, medians and budgets, with a clock that only the cases move."""

from __future__ import annotations

import itertools

import pytest

from kronblocks_lab.bench.measure.timing import Budget, Timing, measure


class Clock:
    """Seconds that pass only where a case takes them."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, *seconds: float):
        """A case whose calls take these times in turn."""
        turns = itertools.cycle(seconds)

        def run() -> None:
            self.now += next(turns)
            self.calls.append(name)

        return run


def timed(budget: Budget, **seconds):
    clock = Clock()
    cases = {name: clock.case(name, *(each if isinstance(each, tuple) else (each,))) for name, each in seconds.items()}
    return measure(cases, budget, clock=clock), clock.calls


def test_times_are_those_of_the_calls():
    times, _ = timed(Budget(0.04, 3), fast=1e-5, middle=2e-3, slow=0.5)
    assert times["fast"].repeats == pytest.approx([1e-2] * 3)
    assert times["middle"].repeats == pytest.approx([2.0] * 3)
    assert times["slow"].repeats == pytest.approx([500.0] * 3)
    assert times["middle"].speed_to(times["slow"]) == pytest.approx((250, 250, 250))


def test_cases_take_turns():
    _, calls = timed(Budget(0.04, 3), a=2e-3, b=2e-3)
    calls = calls[4:]  # after the warm-up
    changes = sum(one != other for one, other in itertools.pairwise(calls))
    assert calls.count("a") == calls.count("b") == 60  # 20 in 0.04 s, in each of three repeats
    assert changes >= 3 * 5  # five rounds a repeat, both cases in each
    rounds = [set(calls[start : start + 8]) for start in range(0, len(calls), 8)]
    assert all(each == {"a", "b"} for each in rounds)


def test_the_order_changes_with_the_round_and_not_with_the_run():
    orders = [timed(Budget(1e-3, 5), a=1.0, b=1.0, c=1.0, d=1.0)[1][4:] for _ in range(2)]
    assert orders[0] == orders[1]
    repeats = [tuple(orders[0][start : start + 4]) for start in range(0, 20, 4)]
    assert all(sorted(each) == ["a", "b", "c", "d"] for each in repeats) and len(set(repeats)) > 1


def test_a_slow_case_is_called_once_a_repeat_and_once_to_warm_up():
    times, calls = timed(Budget(0.04, 3), slow=1.0, fast=1e-3)
    assert calls.count("slow") == 4 and times["slow"].calls == 3
    assert times["fast"].calls == 3 * 40


def test_the_median_ignores_single_slow_calls():
    times, _ = timed(Budget(0.04, 3), noisy=(1e-3, 1e-3, 1e-3, 1e-3, 9e-3), steady=1e-3)
    assert times["noisy"].ms == pytest.approx(1.0)


def test_spread_is_that_of_the_repeats():
    timing, dense = Timing((1.0, 3.0, 2.0), 9), Timing((4.0, 6.0, 8.0), 9)
    assert (timing.ms, timing.spread) == (2.0, (1.0, 3.0))
    assert timing.speed_to(dense) == (3.0, 2.0, 4.0)
