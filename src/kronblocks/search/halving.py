"""Block-size search by held-out loss at equal cost: short trainings side by side on the same batches, in successive rounds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kronblocks.checks import number, one_of, whole
from kronblocks.config import BlockSizeLike, SparsityConfig
from kronblocks.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.choice import deployed_seconds
from kronblocks.search.candidates import Candidate, entrants, with_block
from kronblocks.search.report import Path, Rung, SearchReport
from kronblocks.search.task import SearchTask, Trial

Goal = Literal["step-time", "inference-time", "accuracy"]


@dataclass(frozen=True)
class SearchConfig:
    """How block sizes are searched for.

    Args:
        sizes: the candidates; None: squares of 2 to 64.
        goal: what counts among candidates that lose nothing: "step-time" (of training), "inference-time", or "accuracy" (the
            least held-out loss, whatever it costs).
        budget: steps of all trials together, as a share of the training that follows.
        rounds: after each of which losers go.
        most: candidates that are tried at all.
        tolerance: share of the best held-out loss by which another candidate may be worse and still lose nothing. The standard
            error of the difference comes on top.
        seed: of the batches and the factors.
    """

    sizes: tuple[BlockSizeLike, ...] | None = None
    goal: Goal = "step-time"
    budget: float = 0.5
    rounds: int = 2
    most: int = 6
    tolerance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("goal", self.goal, Goal)
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
    rows: int = 1024,
    search: SearchConfig | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SearchReport:
    """The cheapest block size that loses nothing, found by short trainings of copies of the model.

    In each round every candidate left is trained from the start with the method's whole course (warm-up, pruning, lift, healing)
    in a share of `total_steps`, all in turns on the same batches, then judged on held-out data. A candidate goes when another is
    at least as good and as cheap, or when it is worse than the better half by more than the tolerance. The steps of
    all rounds together are `budget * total_steps`.

    Args:
        model: dense; it stays as it is.
        config: what `sparsify_` will get; its block size does not count.
        task: data and loss.
        total_steps: of the training that follows.
        rows: rows of x per step, for the shortlist by estimated times.
        search: candidates, goal and budget.
        progress: called with a text and the share that is done.

    Returns:
        The report; `report.config(config)` is the config with what was found.

    Raises:
        KronblocksError: no size fits, the budget is too short to train anything, or every candidate diverged.

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
    kept, paths = entrants(model, config, search.sizes, search.most, rows)
    made = 0
    for turn in range(search.rounds):
        if len(kept) == 1:
            break
        steps = int(search.budget * total_steps / search.rounds / len(kept))
        if steps < _LEAST_STEPS:
            raise KronblocksError(
                f"{search.budget} of {total_steps} steps leaves {steps} for each of {len(kept)} candidates, and {_LEAST_STEPS} "
                "are needed: give a larger budget, fewer sizes=, or train longer"
            )
        tell = _teller(progress, f"round {turn + 1} of {search.rounds}: {steps} steps of", turn, search.rounds)
        results = _round(model, config, task, kept, steps, search, tell)
        made += steps * len(kept)
        kept = _judge(results, kept, paths, steps, search, last=turn == search.rounds - 1)
    winner = kept[0]
    paths[str(winner.block)].why = _why_won(paths, winner, search)
    seconds = time.perf_counter() - start
    return SearchReport("halving", search.goal, list(paths.values()), winner.sizes, winner.block, seconds, made)


_LEAST_STEPS = 20

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


def _round(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    kept: Sequence[Candidate],
    steps: int,
    search: SearchConfig,
    tell: _Tell,
) -> dict[str, _Result]:
    """Train all candidates side by side: at each step each takes its turn with the same batch."""
    trials = {str(c.block): Trial(model, with_block(config, c.block), task, steps, search.seed) for c in kept}
    diverged: set[str] = set()
    names = ", ".join(trials)
    batches = task.stream(search.seed)
    for step in range(steps):
        batch: Any = next(batches)
        for name, trial in trials.items():
            if name in diverged:
                continue
            try:
                trial.step(batch)
            except KronblocksError as error:
                if "diverged" not in str(error):
                    raise
                diverged.add(name)
        tell(names, (step + 1) / steps)
    results = {}
    for name, trial in trials.items():
        losses = torch.full((1,), torch.inf) if name in diverged else task.judge(trial.model)
        results[name] = _Result(losses, trial.seconds_per_step, _cost(trial, search.goal))
    return results


def _cost(trial: Trial, goal: Goal) -> float:
    """What the goal counts, in seconds."""
    if goal != "inference-time":
        return trial.seconds_per_step
    layers = [module for module in trial.model.modules() if isinstance(module, BlockLayer)]
    return sum(deployed_seconds(dataclasses.replace(layer.problem(), training=False)) for layer in layers)


def _judge(
    results: dict[str, _Result], kept: list[Candidate], paths: dict[str, Path], steps: int, search: SearchConfig, *, last: bool
) -> list[Candidate]:
    """Note what came out, and give the candidates that go on, the winner alone after the last round."""
    means = {name: float(result.losses.mean()) for name, result in results.items()}
    best = min(means, key=means.__getitem__)
    if not math.isfinite(means[best]):
        raise KronblocksError("every candidate diverged: lower the learning rate of the task")
    rungs = {}
    for name, result in results.items():
        gap, error = math.inf, 0.0
        if math.isfinite(means[name]):
            difference = result.losses - results[best].losses
            gap, error = float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
        rungs[name] = Rung(steps, means[name], gap, error, result.seconds_per_step, result.cost)
        paths[name].rungs.append(rungs[name])
    fine = [name for name in results if loses_nothing(rungs[name], means[best], search.tolerance)]
    wins, stay = None, set()
    if last:
        order = means if search.goal == "accuracy" else {name: rungs[name].cost for name in fine}
        wins = min(order, key=order.__getitem__)
    else:
        ranked = sorted(means, key=means.__getitem__)
        stay = {*fine, *ranked[: math.ceil(len(ranked) / 2)]} & {name for name in means if math.isfinite(means[name])}
        if search.goal != "accuracy":
            stay = {name for name in stay if not _beaten(name, stay, rungs)}
    going_on = [c for c in kept if (str(c.block) == wins if last else str(c.block) in stay)]
    for candidate in kept:
        if candidate not in going_on:
            paths[str(candidate.block)].why = _why_lost(str(candidate.block), rungs, best, fine, wins, search)
    return going_on


def loses_nothing(rung: Rung, best: float, tolerance: float) -> bool:
    """Whether a candidate is as good as the best one, as far as it can be told."""
    return rung.gap <= tolerance * best + rung.gap_error


def _beaten(name: str, others: set[str], rungs: dict[str, Rung]) -> bool:
    """Whether another candidate is better and cheaper, both clearly."""
    own = rungs[name]
    rest = [rungs[other] for other in others if other != name]
    return any(rung.loss < own.loss - own.gap_error and rung.cost < _CLEARLY * own.cost for rung in rest)


_CLEARLY = 0.95  # of a measured time: less of a difference is noise


def _why_lost(name: str, rungs: dict[str, Rung], best: str, fine: list[str], wins: str | None, search: SearchConfig) -> str:
    rung = rungs[name]
    if not math.isfinite(rung.loss):
        return "lost: its training diverged"
    if name not in fine:
        return f"lost: held-out loss {rung.gap:+.4f} ± {rung.gap_error:.4f} against {best}, more than {100 * search.tolerance:g}%"
    if wins is not None and search.goal != "accuracy":
        return f"lost: loses nothing, but costs {1e3 * rung.cost:.3g} ms against {1e3 * rungs[wins].cost:.3g} ms of {wins}"
    if wins is not None:
        return f"lost: held-out loss {rung.gap:+.4f} against {best}"
    return "lost: another candidate is both better and cheaper"


def _why_won(paths: dict[str, Path], winner: Candidate, search: SearchConfig) -> str:
    rungs = paths[str(winner.block)].rungs
    if not rungs:
        return "won: no other candidate was left to try"
    rung = rungs[-1]
    if search.goal == "accuracy":
        return "won: least held-out loss"
    what = "a training step" if search.goal == "step-time" else "inference"
    return f"won: the cheapest ({1e3 * rung.cost:.3g} ms for {what}) of those that lose nothing ({rung.gap:+.4f} to the best)"
