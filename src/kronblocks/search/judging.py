"""Who goes on after a round of the search, who has won, and why the others lost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kronblocks.search.candidates import Candidate
from kronblocks.search.config import SearchConfig
from kronblocks.search.report import Path, percent


@dataclass
class Result:
    losses: Tensor  # (N,)
    seconds_per_step: float
    cost: float
    steps: int
    norms: list[tuple[int, float]] = field(default_factory=list)  # of the candidate's weights, and after which step


def mean_and_error(examples: Tensor) -> tuple[float, float]:
    """The mean over (N,) examples, and its standard error."""
    return float(examples.mean()), float(examples.std()) / math.sqrt(len(examples))


class Standing(NamedTuple):
    """A candidate's means over some rounds, weighted by steps.

    Args:
        gap: how much worse its loss is than the best, as a share of that.
        error: standard error of the gap, over held-out examples.
        cost: by the goal, in seconds.
    """

    gap: float
    error: float
    cost: float

    def loses_nothing(self, tolerance: float) -> bool:
        """Whether its loss is within the tolerance and the error of the best."""
        return self.gap <= tolerance + self.error


def standings(history: Sequence[dict[str, Result]], names: Sequence[str]) -> dict[str, Standing]:
    """The standings of candidates that were in every round, the best one first."""
    steps = [next(iter(results.values())).steps for results in history]
    weights = [each / sum(steps) for each in steps]
    costs = {name: sum(w * results[name].cost for w, results in zip(weights, history, strict=True)) for name in names}

    def against(reference: str) -> dict[str, Standing]:
        found = {name: Standing(math.inf, 0.0, costs[name]) for name in names}
        for name in finite:
            share = torch.zeros((), device="cpu")  # (N,) when summed: examples are the same in every round
            for weight, results in zip(weights, history, strict=True):
                own, others = results[name].losses, results[reference].losses
                share = share + weight * (own - others) / others.mean()
            found[name] = Standing(*mean_and_error(share), costs[name])
        return found

    finite = [name for name in names if all(torch.isfinite(results[name].losses).all() for results in history)]
    best = min(finite, key=lambda name: against(finite[0])[name].gap)
    found = against(best)
    return {name: found[name] for name in sorted(names, key=lambda name: found[name].gap)}


def judge(
    history: Sequence[dict[str, Result]],
    kept: Sequence[Candidate],
    paths: dict[str, Path],
    search: SearchConfig,
    *,
    last: bool,
) -> list[Candidate]:
    """The candidates that stay (after the last round only the winner); writes into `paths` why the others lost."""
    places = standings(history, [str(candidate.block) for candidate in kept])
    best = next(iter(places))
    fine = [name for name, place in places.items() if place.loses_nothing(search.tolerance)]
    if last:
        least = min(places[name].cost for name in fine)
        cheap = [name for name in fine if places[name].cost <= least / _CLEARLY]  # the best of these comes first
        stay = [best if search.goal == "accuracy" else cheap[0]]
    else:
        order = [best, *sorted(fine, key=lambda name: places[name].cost), *places]
        ranked = [
            name for name in dict.fromkeys(places if search.goal == "accuracy" else order) if math.isfinite(places[name].gap)
        ]
        stay = ranked[: max(2, math.ceil(len(places) / 2))]  # two compete to the end
    for name, place in places.items():
        paths[name].gap, paths[name].gap_error = (place.gap, place.error) if math.isfinite(place.gap) else (None, None)
        if name not in stay:
            paths[name].why = _why_lost(place, best, name in fine, stay, places[stay[0]].cost, search)
        elif last:
            paths[name].why = _why_won(place, search)
    return [candidate for candidate in kept if str(candidate.block) in stay]


_CLEARLY = 0.95  # ratios of measured times above this are noise


def _worse(place: Standing) -> str:
    return f"held-out loss {percent(place.gap, place.error)}"


def _why_lost(place: Standing, best: str, fine: bool, stay: Sequence[str], least: float, search: SearchConfig) -> str:
    if not math.isfinite(place.gap):
        return "lost: its training diverged"
    if not fine:
        return f"lost: {_worse(place)} against {best}, more than {100 * search.tolerance:g}%"
    if search.goal == "accuracy" or len(stay) > 1:
        return f"lost: {_worse(place)} against {best}, and {' and '.join(stay)} are better or cheaper"
    cheaper = f"takes {1e3 * least:.3g} ms, not {1e3 * place.cost:.3g} ms" if least < place.cost else "is as cheap and better"
    return f"lost: loses nothing ({_worse(place)} against {best}), but {stay[0]} {cheaper}"


def _why_won(place: Standing, search: SearchConfig) -> str:
    if search.goal == "accuracy":
        return "won: least held-out loss"
    what = "a training step" if search.goal == "step-time" else "inference"
    return f"won: the cheapest ({1e3 * place.cost:.3g} ms for {what}) of those that lose nothing ({_worse(place)} to the best)"
