"""Block-size search in one model: each layer trains all candidates together, and losers are removed until one is left."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kronblocks.config.methods import COMMON_RANK
from kronblocks.config.ranks import RankChoice
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import Diverged, KronblocksError
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.search.candidates import Candidate, entrants
from kronblocks.search.config import MixtureConfig
from kronblocks.search.report import Path, SearchReport
from kronblocks.search.task import SearchTask, steps_of_search
from kronblocks.surgery.optimizers import drop_parameters_
from kronblocks.surgery.replace import in_mode, replace_, to_unfold, unfolding

_USUAL_BUDGET = 0.5


def find_block_size_in_mixture_(
    model: nn.Module,
    config: SparsityConfig,
    task: SearchTask,
    *,
    total_steps: int,
    search: MixtureConfig | None = None,
    sizes: Sequence[Any] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SearchReport:
    """Replace the selected layers by mixtures, train, and remove candidates until each layer has one, in place.

    Afterwards the layers are `KroneckerBlockLinear` with trained factors, which `sparsify_` accepts.

    Args:
        model: dense.
        config: layers, rank (4 if unset) and tile groups, with overrides; its block size is ignored. Candidates begin from
            random factors.
        task: data, loss and optimiser; its settings for lifted values do not matter here.
        total_steps: of the training that follows.
        search: the criterion.
        sizes: candidates; None: squares with sides 2, 4, ... 64.
        progress: called with a text and the share that is done.

    Raises:
        KronblocksError: as in `find_block_size`; or the method has no factors, or the config starts from the present weights.
            Nothing has changed then, unless the training diverged.
    """
    search, start = search or MixtureConfig(), time.perf_counter()
    if not config.spec.is_factored:
        raise KronblocksError(
            f"candidates that are trained together are made of factors, but method {config.method!r} has none: use "
            "find_block_size (--criterion halving), or method 'two-phase' or 'kron-l1'"
        )
    if config.init not in (None, "random") or isinstance(config.rank, RankChoice):
        raise KronblocksError(
            "candidates trained together begin from new factors, but init='nearest', init='spectral' and RankChoice need the "
            "present weights: use find_block_size (--criterion halving), or leave init out and give rank a number"
        )
    if config.resolved().rank == "by-area":
        config = dataclasses.replace(config, rank=COMMON_RANK)
    task.check(model)
    kept, paths = entrants(model, config, sizes, search.most, functools.partial(task.rows, seed=search.seed))
    parts = len(kept) / (1 - search.train_first) if len(kept) > 1 else 0
    steps = steps_of_search(search.budget, _USUAL_BUDGET, total_steps, parts, f"each of {len(kept) - 1} removals")
    run = _MixtureTraining(model, task, kept, search, max(1, steps))
    run.train(paths, progress)
    chosen = run.collapse()
    survivors = set(run.survivors.values())
    winner = next(c.block for c in kept if str(c.block) in survivors) if len(survivors) == 1 else None
    for name in survivors:
        layers = [layer for layer, survivor in run.survivors.items() if survivor == name]
        paths[name].why = "won" if winner else f"won in {', '.join(layers)}"
    seconds = time.perf_counter() - start
    goal = "held-out loss" if search.criterion == "removal" else "norm"
    if search.weights == "time":
        goal += " per unit of time"
    return SearchReport(search.criterion, goal, list(paths.values()), chosen, winner, seconds, run.steps)


class _MixtureTraining:
    """The model with mixtures, its optimiser, and the candidates that are left."""

    def __init__(
        self,
        model: nn.Module,
        task: SearchTask,
        kept: Sequence[Candidate],
        search: MixtureConfig,
        steps: int,
    ) -> None:
        self._model, self._task, self._search, self.steps = model, task, search, steps
        self._mixtures: dict[str, BlockMixtureLinear] = {}
        fits = {str(c.block): {layer.name: layer for layer in c.layers} for c in kept}
        names = [layer.name for layer in kept[0].layers if all(layer.name in found for found in fits.values())]
        if not names:
            raise KronblocksError("no layer fits all candidates: name other sizes, or search by short trainings")
        with torch.random.fork_rng(devices=[]), unfolding(model, to_unfold(model, names)):
            torch.manual_seed(search.seed)
            for name in names:
                linear = model.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                here = {candidate: found[name] for candidate, found in fits.items()}
                mixture = BlockMixtureLinear.like(
                    linear,
                    {candidate: each.grid.block for candidate, each in here.items()},
                    {candidate: each.rank for candidate, each in here.items()},
                    tile_groups={candidate: each.tile_groups for candidate, each in here.items()},
                )
                replace_(model, name, mixture)
                self._mixtures[name] = mixture
        self._seconds = {str(c.block): c.layer_seconds for c in kept}
        self._optimizer, self._schedule = task.optimizer(model, steps)
        self.survivors: dict[str, str] = {}

    def train(self, paths: dict[str, Path], progress: Callable[[str, float], None] | None) -> None:
        """Make all steps, with the removals between them."""
        search, first = self._search, int(self._search.train_first * self.steps)
        count = max(len(mixture.candidates) for mixture in self._mixtures.values())
        removals = {first + round((i + 1) * (self.steps - first) / count) for i in range(count - 1)}
        batches = self._task.stream(search.seed)
        with in_mode(self._model, training=True):
            for step in range(1, self.steps + 1):
                self._step(next(batches))
                if search.criterion == "penalty" and step > first:
                    self._shrink(step, first, paths)
                if search.criterion == "removal" and step in removals:
                    self._remove_worst(step, paths)
                if step % max(1, self.steps // 50) == 0:
                    self._note(step, paths)
                if progress is not None:
                    left = sorted({name for mixture in self._mixtures.values() for name in mixture.candidates})
                    progress(f"training {', '.join(left)} together", step / self.steps)
        while any(len(mixture.candidates) > 1 for mixture in self._mixtures.values()):
            self._remove_least(self.steps, paths)

    def _step(self, batch: Any) -> None:
        loss = self._task.losses(self._model, batch).mean()
        if not torch.isfinite(loss):
            raise Diverged("the training of the mixture diverged: lower the learning rate of the task")
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()

    def _weights(self, scope: Iterable[str]) -> dict[str, float]:
        """Numbers to divide each candidate's contribution by, for some layers; 1 on average."""
        if self._search.weights == "equal":
            return dict.fromkeys(self._seconds, 1.0)
        seconds = {name: sum(layers[layer] for layer in scope) for name, layers in self._seconds.items()}
        return {name: own * len(seconds) / sum(seconds.values()) for name, own in seconds.items()}

    def _scopes(self) -> list[dict[str, BlockMixtureLinear]]:
        """Groups of mixtures that remove the same candidate together."""
        return [{name: m} for name, m in self._mixtures.items()] if self._search.per_layer else [self._mixtures]

    def _shrink(self, step: int, first: int, paths: dict[str, Path]) -> None:
        """The proximal step of the group penalty on whole candidates.

        It does not depend on the learning rate. Else losers might stay above 0 as that falls.
        """
        search = self._search
        strength = search.strength * search.growth ** ((step - first) / (self.steps - first)) / (self.steps - first)
        for scope in self._scopes():
            norms = _norms(scope)
            if len(norms) < 2:
                continue
            typical, weights = sum(norms.values()) / len(norms), self._weights(scope)
            left = {name: norm - strength * typical * weights[name] for name, norm in norms.items()}
            most = max(norms, key=lambda name: norms[name] / weights[name])  # stays if all would be removed at once
            for name, norm in norms.items():
                if left[name] > 0:
                    for mixture in scope.values():
                        mixture.scale_(name, left[name] / norm)
                elif name != most:
                    self._remove(scope, name, f"lost: its norm was shrunk to 0 at step {step}", paths)

    def _remove_worst(self, step: int, paths: dict[str, Path]) -> None:
        """In each scope, remove the candidate that is missed least for the time it takes."""
        for scope in self._scopes():
            names = list(_norms(scope))
            if len(names) < 2:
                continue
            whole = self._task.judge(self._model).mean()
            missed = {name: float(self._without(scope, name) - whole) for name in names}
            # what does harm has to go, and first what takes long
            weights = self._weights(scope)
            rated = {name: value / weights[name] if value > 0 else value * weights[name] for name, value in missed.items()}
            worst = min(rated, key=rated.__getitem__)
            others = ", ".join(f"{name} {value:+.4f}" for name, value in rated.items() if name != worst)
            why = (
                f"lost at step {step}: without it held-out loss rises by {missed[worst]:.4f}, for the time it takes by "
                f"{rated[worst]:+.4f} (others: {others})"
            )
            self._remove(scope, worst, why, paths)

    def _without(self, scope: dict[str, BlockMixtureLinear], name: str) -> float:
        """Mean held-out loss without a candidate's weights."""
        kept = {layer: mixture.candidates[name] for layer, mixture in scope.items()}
        saved = {layer: [p.detach().clone() for p in module.parameters()] for layer, module in kept.items()}
        for mixture in scope.values():
            mixture.scale_(name, 0.0)
        loss = float(self._task.judge(self._model).mean())
        with torch.no_grad():
            for layer, module in kept.items():
                for parameter, before in zip(module.parameters(), saved[layer], strict=True):
                    parameter.copy_(before)
        return loss

    def _remove_least(self, step: int, paths: dict[str, Path]) -> None:
        """At the end, remove the candidate of least norm in each scope."""
        for scope in self._scopes():
            norms = _norms(scope)
            if len(norms) > 1:
                least = min(norms, key=norms.__getitem__)
                self._remove(scope, least, f"lost: of least norm ({norms[least]:.3g}) when the steps were over", paths)

    def _remove(self, scope: dict[str, BlockMixtureLinear], name: str, why: str, paths: dict[str, Path]) -> None:
        for layer, mixture in scope.items():
            drop_parameters_([self._optimizer], mixture.remove_(name))
            if self._search.per_layer:
                why = f"{paths[name].why}; {layer}: {why}".removeprefix("; ")
            paths[name].why = why

    def _note(self, step: int, paths: dict[str, Path]) -> None:
        for name, norm in _norms(self._mixtures).items():
            if math.isfinite(norm):
                paths[name].history.append({"step": step, "norm": norm})

    def collapse(self) -> dict[str, str]:
        """Replace every mixture by its last candidate; returns the block size of each layer."""
        chosen = {}
        for name, mixture in self._mixtures.items():
            (self.survivors[name],) = mixture.candidates
            layer = mixture.collapse()
            layer.choose_plan_()
            chosen[name] = str(layer.grid.block)
            replace_(self._model, name, layer.train(mixture.training))
        return chosen


def _norms(scope: dict[str, BlockMixtureLinear]) -> dict[str, float]:
    """The norm of each candidate over all layers of a scope that still have it."""
    squares: dict[str, float] = {}
    for mixture in scope.values():
        for name, norm in mixture.norms().items():
            squares[name] = squares.get(name, 0.0) + norm**2
    return {name: math.sqrt(value) for name, value in squares.items()}
