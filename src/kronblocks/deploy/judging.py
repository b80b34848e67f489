"""Find the forms of layers that make a whole model fastest: wholes are timed in turns, and groups of equal layers are switched.

A layer that is fastest alone, with its weights in the caches, need not be the best part of a model whose weights are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Forms = tuple[str, ...]
"""A form for each block layer, in the model's order."""

Run = Callable[[Forms | None], float]
"""Seconds of one turn of the model with these forms; None: of the model as it was."""

now = time.perf_counter

BUDGET = 15.0
"""Seconds of timing, unless a model is so slow that a single turn of each whole takes longer."""

_GAIN = 1.02  # a switch has to make the whole so many times as fast
_LEAST_TURNS, _MOST_TURNS = 3, 9
_CLEAR = 1.15  # after the least number of turns, a difference of so many times needs no more
_DROP = 1.5  # what takes so many times as long as the best one leaves a comparison of several
_WHOLES_SHARE = 0.3  # of the budget, for the first comparison; as much as it takes is left for the last one


@dataclass(frozen=True)
class Judged:
    """The forms that won, and what was timed.

    Args:
        forms: by layer.
        seconds: of the wholes that were timed together in the end: "exported", "dense" (all block layers dense), "model" (as it
            was), and the others by name, from the first comparison.
        timed: number of different wholes that were timed.
        complete: False if the budget ended the search before every switch was tried.
    """

    forms: Forms
    seconds: Mapping[str, float]
    timed: int
    complete: bool


def judge(
    wholes: Mapping[str, Forms],
    groups: Mapping[str, Sequence[int]],
    options: Sequence[Sequence[str]],
    run: Run,
    budget: float = BUDGET,
    progress: Callable[[str], None] = lambda what: None,
) -> Judged:
    """Time whole models, and switch groups of equal layers as long as that makes the fastest one faster.

    Args:
        wholes: the first candidates by name, with "dense" among them.
        groups: numbers of equal layers, which are switched together, by name; the ones with most work first.
        options: the forms that each layer can have.
        run: times one turn.
        budget: seconds; the search ends then. The wholes themselves have a turn in any case.
        progress: gets what is being timed.
    """
    start = now()
    together: list[Forms | None] = [*dict.fromkeys(wholes.values()), None]
    progress(f"{len(together)} whole models")
    first = _in_turns(together, run, start + _WHOLES_SHARE * budget)
    best = min(dict.fromkeys(wholes.values()), key=first.__getitem__)
    tried, complete = set(wholes.values()), True
    end = start + budget - (now() - start)  # the last comparison takes about as long as the first one
    improved = bool(groups)
    while improved and complete:
        improved = False
        for name, layers in groups.items():
            for form in dict.fromkeys(form for layer in layers for form in options[layer]):
                other = tuple(form if i in layers and form in options[i] else own for i, own in enumerate(best))
                if other in tried:
                    continue
                if now() >= end:
                    complete = False
                    break
                progress(f"{name} {form}")
                tried.add(other)
                if _is_faster(other, best, run, end):
                    best, improved = other, True
    safe = dict.fromkeys([best, wholes["dense"], *(wholes[name] for name in ("as it was",) if name in wholes)])
    progress("the fastest whole again")
    last = _in_turns([*safe, None], run, start + budget)
    safest = min(safe, key=lambda forms: last[forms] * (1 if forms == best else _GAIN))
    named = {name: first[forms] for name, forms in wholes.items()}
    seconds = {**named, "exported": last[safest], "dense": last[wholes["dense"]], "model": last[None]}
    return Judged(safest, seconds, len(tried), complete)


def _in_turns(candidates: Sequence[Forms | None], run: Run, end: float) -> dict[Forms | None, float]:
    """Median seconds of each. What is clearly slower than the best one has only a few turns."""
    taken: dict[Forms | None, list[float]] = {each: [] for each in candidates}
    running = list(candidates)
    for turn in range(_MOST_TURNS):
        for each in running if turn % 2 == 0 else running[::-1]:
            taken[each].append(run(each))
        if now() >= end:
            break
        if turn + 1 == _LEAST_TURNS:
            least = min(median(values) for values in taken.values())
            running = [each for each in running if median(taken[each]) < _DROP * least]
    return {each: median(values) for each, values in taken.items()}


def _is_faster(other: Forms, best: Forms, run: Run, end: float) -> bool:
    """Whether a whole is faster than another one by more than noise: in the median, and in two of three turns."""
    ours, theirs, ratio = [], [], 1.0
    for turn in range(_MOST_TURNS):
        pair = ((other, ours), (best, theirs))
        for forms, taken in pair if turn % 2 == 0 else pair[::-1]:
            taken.append(run(forms))
        ratio = median(theirs) / max(median(ours), 1e-12)
        if turn + 1 >= _LEAST_TURNS and (not 1 / _CLEAR < ratio < _CLEAR or now() >= end):
            break
    won = sum(one < two for one, two in zip(ours, theirs, strict=True))
    return ratio > _GAIN and 3 * won >= 2 * len(ours)
