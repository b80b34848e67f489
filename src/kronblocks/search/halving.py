"""Block-size search by held-out loss after equally many steps: short trainings side by side, in rounds of successive halving."""

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
) -> dict[str, Result]:
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
        results[name] = Result(losses, trial.seconds_per_step, cost(trial), steps, norms[name])
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


def _note(results: dict[str, Result], paths: dict[str, Path], steps: int) -> None:
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
        gap, error = mean_and_error(result.losses - results[best].losses) if finite else (math.inf, 0.0)
        paths[name].rungs.append(Rung(steps, means[name], gap, error, result.seconds_per_step, result.cost))
