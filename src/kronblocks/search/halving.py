"""Block-size search by held-out loss after equally many steps: short trainings side by side, in rounds of successive halving."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kronblocks.config.parts import BlockSizeLike
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.checks import number, one_of, whole
from kronblocks.core.errors import Diverged
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.costs.choice import choose_deployed
from kronblocks.ops.problem import Problem
from kronblocks.search.candidates import Candidate, entrants, with_block
from kronblocks.search.report import Path, Rung, SearchReport, percent
from kronblocks.search.task import SearchTask, Trial, steps_of_search

Goal = Literal["step-time", "inference-time", "accuracy"]


@dataclass(frozen=True)
class SearchConfig:
    """How block sizes are searched for.

    Args:
        sizes: the candidates; None: squares of powers of two from 2 to 64.
        goal: what counts among candidates that lose nothing: "step-time" (of training), "inference-time", or "accuracy" (the
            least held-out loss, whatever it costs).
        budget: steps of all trials together, as a share of the training that follows; None: 1, or more where that leaves a trial
            fewer than 20.
        rounds: after each of which about half of the candidates go. Each has other batches and factors, and what counts is a
            candidate's mean over all its rounds: two trainings that differ in nothing else end a percent or two apart.
        most: candidates that are tried at all.
        tolerance: share of the best held-out loss by which another candidate may be worse and still lose nothing. The standard
            error of the difference, over held-out examples, comes on top.
        seed: of the batches and the factors.
    """

    sizes: tuple[BlockSizeLike, ...] | None = None
    goal: Goal = "step-time"
    budget: float | None = None
    rounds: int = 3
    most: int = 6
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("goal", self.goal, Goal)
        if self.budget is not None:
            number("budget", self.budget, 1e-300, math.inf, "steps of all trials, as a share of the training's, above 0")
        number("tolerance", self.tolerance, 0, math.inf, "a share of the best held-out loss, from 0 on")
        whole("rounds", self.rounds, "the number of rounds")
        whole("most", self.most, "how many candidates are tried")


def find_block_size(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    *,
    total_steps: int,
    search: SearchConfig | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SearchReport:
    """The cheapest block size that loses nothing, found by short trainings of copies of the model.

    In each round every candidate left is trained from the start with the method's whole course (warm-up, pruning, lift, healing)
    in a share of `total_steps`, all in turns on the same batches, then judged on held-out data. The better half goes on: the best
    one, then those that lose nothing, the cheapest first, then the others by their loss. All rounds have equally many steps,
    and together `budget * total_steps`.

    Args:
        model: dense; it stays as it is.
        config: what `sparsify_` will get; its block size does not count.
        task: data and loss.
        total_steps: of the training that follows.
        search: candidates, goal and budget.
        progress: called with a text and the share that is done.

    Returns:
        The report; `report.config(config)` is the config with what was found.

    Raises:
        KronblocksError: losses that are not one for each example, nothing held out, no size that fits, a model that is
            block-sparse already, a budget too short to train anything, or every candidate diverged.

    Source:
        Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016, for
        successive halving.

    >>> from kronblocks import sparsify_
    >>> def batches(seed):
    ...     generator = torch.Generator().manual_seed(seed)
    ...     while True:
    ...         yield torch.randn(32, 16, generator=generator)
    >>> def losses(model, x):  # one for each example
    ...     return (model(x) - x.flip(1)).square().mean(1)
    >>> model, config = nn.Sequential(nn.Linear(16, 16)), SparsityConfig(rank=1, target_sparsity=0.5)
    >>> task = SearchTask(batches, held_out=[torch.randn(64, 16)], losses=losses, lr=1e-2)
    >>> report = find_block_size(model, config, task, total_steps=200, search=SearchConfig(sizes=(2, 4)))
    >>> sparsifier = sparsify_(model, report.config(config))  # and train
    """
    search = search or SearchConfig()
    start = time.perf_counter()
    task.check(model)
    rows: dict[str, int] = {}

    def count_rows(unfolded: nn.Module) -> dict[str, int]:
        rows.update(task.rows(unfolded, search.seed))
        return rows

    kept, paths = entrants(model, config, search.sizes, search.most, count_rows)
    cost = functools.partial(_cost, goal=search.goal, rows=rows)
    parts = search.rounds * len(kept) if len(kept) > 1 else 0
    for_what = f"each of {len(kept)} candidates in each of {search.rounds} rounds"
    all_steps = steps_of_search(search.budget, _USUAL_BUDGET, total_steps, parts, for_what)
    made, history = 0, []
    for turn in range(search.rounds):
        if len(kept) == 1:
            break
        steps = all_steps // (search.rounds * len(kept))
        tell = _teller(progress, f"round {turn + 1} of {search.rounds}: {steps} steps of", turn, search.rounds)
        results = _round(model, config, task, kept, steps, cost, search.seed + turn, tell)
        for name, result in results.items():
            paths[name].history += [{"round": turn + 1, "step": step, "norm": norm} for step, norm in result.norms]
        made += steps * len(kept)
        history.append(results)
        _note(results, paths, steps)
        kept = _judge(history, kept, paths, search, last=turn == search.rounds - 1)
    winner = kept[0]
    paths[str(winner.block)].why = paths[str(winner.block)].why or "won: no other candidate was left"
    seconds = time.perf_counter() - start
    return SearchReport("halving", search.goal, list(paths.values()), winner.sizes, winner.block, seconds, made)


_USUAL_BUDGET = 1.0

_Tell = Callable[[str, float], None]


def _teller(progress: Callable[[str, float], None] | None, prefix: str, number: int, rounds: int) -> _Tell:
    if progress is None:
        return lambda text, done: None
    return lambda text, done: progress(f"{prefix} {text}", (number + done) / rounds)


@dataclass
class _Result:
    losses: Tensor  # (N,)
    seconds_per_step: float
    cost: float
    steps: int
    norms: list[tuple[int, float]] = field(default_factory=list)  # of the candidate's weights, and after which step


_NOTES = 20  # norms that are noted in a round


def _round(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    kept: Sequence[Candidate],
    steps: int,
    cost: Callable[[Trial], float],
    seed: int,
    tell: _Tell,
) -> dict[str, _Result]:
    """Train all candidates side by side: at each step each takes its turn with the same batch."""
    trials = {str(c.block): Trial(model, with_block(config, c.block), task, steps, seed) for c in kept}
    diverged: set[str] = set()
    names = ", ".join(trials)
    norms: dict[str, list[tuple[int, float]]] = {name: [] for name in trials}

    def note(step: int) -> None:
        noted = {name: trial.norm() for name, trial in trials.items() if name not in diverged}
        for name, norm in noted.items():
            if math.isfinite(norm):  # else it diverges, which its next step will tell
                norms[name].append((step, norm))

    note(0)
    batches = task.stream(seed)
    for step in range(steps):
        batch: Any = next(batches)
        for name, trial in trials.items():
            if name in diverged:
                continue
            try:
                trial.step(batch)
            except Diverged:
                diverged.add(name)
        if (step + 1) % max(1, steps // _NOTES) == 0:
            note(step + 1)
        tell(names, (step + 1) / steps)
    results = {}
    for name, trial in trials.items():
        losses = torch.full((1,), torch.inf, device="cpu") if name in diverged else task.judge(trial.model)
        results[name] = _Result(losses, trial.seconds_per_step, cost(trial), steps, norms[name])
    return results


def _cost(trial: Trial, goal: Goal, rows: Mapping[str, int]) -> float:
    """What the goal counts, in seconds; the inference of plain layers with masks is that of what `export` makes of them.

    Args:
        trial: when it is over.
        goal: of the search.
        rows: of x in a training step, by the layers' names.
    """
    if goal != "inference-time":
        return trial.seconds_per_step
    problems = [module.problem(training=False) for module in trial.model.modules() if isinstance(module, BlockLayer)]
    for target in trial.sparsifier.targets:
        if target.is_plain:
            weight, density = target.module.get_parameter("weight"), int(target.mask.sum()) / target.grid.blocks
            kind = {"dtype": weight.dtype, "device": weight.device.type, "training": False}
            problems.append(Problem(target.grid, None, rows=rows[target.name], density=density, **kind))
    return sum(choose_deployed(problem).seconds for problem in problems)


def _note(results: dict[str, _Result], paths: dict[str, Path], steps: int) -> None:
    """Write a round into the candidates' paths.

    Raises:
        Diverged: every candidate did.
    """
    means = {name: float(result.losses.mean()) for name, result in results.items()}
    best = min(means, key=means.__getitem__)
    if not math.isfinite(means[best]):
        raise Diverged("every candidate diverged: lower the learning rate of the task")
    for name, result in results.items():
        finite = math.isfinite(means[name])
        gap, error = _mean_and_error(result.losses - results[best].losses) if finite else (math.inf, 0.0)
        paths[name].rungs.append(Rung(steps, means[name], gap, error, result.seconds_per_step, result.cost))


def _mean_and_error(examples: Tensor) -> tuple[float, float]:
    """Mean over (N,) examples, and its standard error."""
    return float(examples.mean()), float(examples.std()) / math.sqrt(len(examples))


class Standing(NamedTuple):
    """A candidate's place after some rounds, which count by their steps.

    Args:
        gap: how much worse than the best, as a share of the best one's loss.
        error: standard error of that, over held-out examples.
        cost: what the goal counts, in seconds.
    """

    gap: float
    error: float
    cost: float

    def loses_nothing(self, tolerance: float) -> bool:
        """Whether it is as good as the best one, as far as it can be told."""
        return self.gap <= tolerance + self.error


def standings(history: Sequence[dict[str, _Result]], names: Sequence[str]) -> dict[str, Standing]:
    """Where candidates that were in every round stand, the best one first."""
    steps = [next(iter(results.values())).steps for results in history]
    weights = [each / sum(steps) for each in steps]
    costs = {name: sum(w * results[name].cost for w, results in zip(weights, history, strict=True)) for name in names}

    def against(reference: str) -> dict[str, Standing]:
        found = {name: Standing(math.inf, 0.0, costs[name]) for name in names}
        for name in finite:
            share = torch.zeros((), device="cpu")  # of each example, held out in every round alike: (N,) when summed
            for weight, results in zip(weights, history, strict=True):
                own, others = results[name].losses, results[reference].losses
                share = share + weight * (own - others) / others.mean()
            found[name] = Standing(*_mean_and_error(share), costs[name])
        return found

    finite = [name for name in names if all(torch.isfinite(results[name].losses).all() for results in history)]
    best = min(finite, key=lambda name: against(finite[0])[name].gap)
    found = against(best)
    return {name: found[name] for name in sorted(names, key=lambda name: found[name].gap)}


def _judge(
    history: Sequence[dict[str, _Result]],
    kept: Sequence[Candidate],
    paths: dict[str, Path],
    search: SearchConfig,
    *,
    last: bool,
) -> list[Candidate]:
    """The candidates that go on, the winner alone after the last round, and why the others lost."""
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


_CLEARLY = 0.95  # of a measured time: less of a difference is noise


def _worse(place: Standing) -> str:
    return f"held-out loss {percent(place.gap, place.error)}"


def _why_lost(place: Standing, best: str, fine: bool, stay: Sequence[str], least: float, search: SearchConfig) -> str:
    if not math.isfinite(place.gap):
        return "lost: its training diverged"
    if not fine:
        return f"lost: {_worse(place)} against {best}, more than {100 * search.tolerance:g}%"
    if search.goal == "accuracy" or len(stay) > 1:
        return f"lost: {_worse(place)} against {best}, and {' and '.join(stay)} are better or cheaper"
    cheaper = f"takes {1e3 * least:.3g} ms and not {1e3 * place.cost:.3g} ms" if least < place.cost else "is as cheap and better"
    return f"lost: loses nothing ({_worse(place)} against {best}), but {stay[0]} {cheaper}"


def _why_won(place: Standing, search: SearchConfig) -> str:
    if search.goal == "accuracy":
        return "won: least held-out loss"
    what = "a training step" if search.goal == "step-time" else "inference"
    return f"won: the cheapest ({1e3 * place.cost:.3g} ms for {what}) of those that lose nothing ({_worse(place)} to the best)"
