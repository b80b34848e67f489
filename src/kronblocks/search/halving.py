"""Block-size search by successive halving: short trainings side by side, compared by held-out loss."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import Diverged
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.costs.choice import choose_deployed
from kronblocks.ops.problem import Problem
from kronblocks.search.candidates import Candidate, entrants, with_block
from kronblocks.search.config import Goal, SearchConfig
from kronblocks.search.judging import Result, judge, mean_and_error
from kronblocks.search.report import Path, Rung, SearchReport
from kronblocks.search.task import SearchTask, Trial, steps_of_search


def find_block_size(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    *,
    total_steps: int,
    search: SearchConfig | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SearchReport:
    """Find the cheapest block size that loses nothing, by short trainings of copies of the model.

    A round trains every candidate left from the start, all in turns on the same batches, and judges them on held-out data.
    Each training runs the method's whole course (warm-up, pruning, lift, healing) in few steps. The better half stays: the best
    one, then those that lose nothing, the cheapest first, then the others by their loss. All rounds have equally many steps,
    together `budget * total_steps`.

    Args:
        model: dense; it stays unchanged.
        config: what `sparsify_` will get; its block size is ignored.
        task: data and loss.
        total_steps: of the training that follows.
        search: candidates, goal and budget.
        progress: called with a text and the share that is done.

    Returns:
        The report; `report.config(config)` is the config with the size that was found.

    Raises:
        KronblocksError: losses are not one per example; nothing is held out; no size fits; the model is block-sparse already;
            the budget is too short to train; or every candidate diverged.

    Source:
        Successive halving: Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
        AISTATS 2016.

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
        kept = judge(history, kept, paths, search, last=turn == search.rounds - 1)
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


_NOTES = 20  # how many norms a round records


def _round(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    kept: Sequence[Candidate],
    steps: int,
    cost: Callable[[Trial], float],
    seed: int,
    tell: _Tell,
) -> dict[str, Result]:
    """Train all candidates side by side: at each step, all use the same batch in turn."""
    trials = {str(c.block): Trial(model, with_block(config, c.block), task, steps, seed) for c in kept}
    diverged: set[str] = set()
    names = ", ".join(trials)
    norms: dict[str, list[tuple[int, float]]] = {name: [] for name in trials}

    def note(step: int) -> None:
        noted = {name: trial.norm() for name, trial in trials.items() if name not in diverged}
        for name, norm in noted.items():
            if math.isfinite(norm):  # else the next step raises Diverged
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
        results[name] = Result(losses, trial.seconds_per_step, cost(trial), steps, norms[name])
    return results


def _cost(trial: Trial, goal: Goal, rows: Mapping[str, int]) -> float:
    """The cost by the goal, in seconds. For inference, masked plain layers count as `export` would pack them.

    Args:
        trial: a finished one.
        goal: of the search.
        rows: of x in a training step, by layer name.
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


def _note(results: dict[str, Result], paths: dict[str, Path], steps: int) -> None:
    """Add a round to the candidates' paths; raise Diverged if every candidate diverged."""
    means = {name: float(result.losses.mean()) for name, result in results.items()}
    best = min(means, key=means.__getitem__)
    if not math.isfinite(means[best]):
        raise Diverged("every candidate diverged: lower the learning rate of the task")
    for name, result in results.items():
        finite = math.isfinite(means[name])
        gap, error = mean_and_error(result.losses - results[best].losses) if finite else (math.inf, 0.0)
        paths[name].rungs.append(Rung(steps, means[name], gap, error, result.seconds_per_step, result.cost))
