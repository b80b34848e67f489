"""SearchTask, the data and loss of a search, and Trial, one short training of a candidate."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError, PerformanceWarning
from kronblocks.core.hooks import rows_reaching
from kronblocks.surgery.groups import FACTOR_LR_SCALE, LIFTED_LR_SCALE, TILE_LR_SCALE, parameter_groups
from kronblocks.surgery.replace import evaluating
from kronblocks.surgery.sparsify import sparsify_


@dataclass(frozen=True)
class SearchTask:
    """Training data, held-out data and the loss.

    Args:
        batches: gives endless training batches for a seed.
        held_out: a list of batches that no training uses; never the test set.
        losses: gives the loss of every example (or token) of a batch, (N,), differentiable; not their mean.
        lr: learning rate of AdamW for what is not sparse, as for `parameter_groups`.
        weight_decay: of dense weights, and of free block values.
        factor_weight_decay: of factors.
        lifted_weight_decay: of free block values; None: `weight_decay`.
        factor_lr_scale: multiplies the rate of factors.
        tile_lr_scale: multiplies the rate of tiles further.
        lifted_lr_scale: multiplies the rate of free block values.
    """

    batches: Callable[[int], Iterator[Any]]
    held_out: Sequence[Any]
    losses: Callable[[nn.Module, Any], Tensor]
    lr: float = 4e-3
    weight_decay: float = 0.0
    factor_weight_decay: float = 0.0
    factor_lr_scale: float = FACTOR_LR_SCALE
    tile_lr_scale: float = TILE_LR_SCALE
    lifted_lr_scale: float = LIFTED_LR_SCALE
    lifted_weight_decay: float | None = None

    def stream(self, seed: int) -> Iterator[Any]:
        """The training batches.

        Raises:
            KronblocksError: they end.
        """
        number = 0
        for batch in self.batches(seed):
            number += 1
            yield batch
        raise KronblocksError(f"batches(seed) ended after {number} batches: let it begin again, in a `while True:` loop")

    def check(self, model: nn.Module) -> None:
        """Check the losses of one held-out batch. The model and the random state stay unchanged.

        Raises:
            KronblocksError: losses are not one per example, or nothing is held out.
        """
        held_out: object = self.held_out
        if isinstance(held_out, Tensor | Mapping | str | Iterator) or not isinstance(held_out, Iterable):
            raise KronblocksError(
                f"held_out is a list of batches, not {type(held_out).__name__}: write held_out=[batch], or list(batches)"
            )
        first = list(itertools.islice(held_out, 2))
        if not first:
            raise KronblocksError("held_out has no batch: give at least one, of data that no training sees")
        with _same_random_state(model), torch.no_grad(), evaluating(model):
            losses: object = self.losses(model, first[0])
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            shape = f"of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise KronblocksError(
                f'losses(model, batch) must give one loss for each example, (N,), not {shape}: write reduction="none" in '
                "the loss function, .mean(1) or .flatten() if it has more dimensions, and no .mean() or .item()"
            )
        if len(losses) + len(first) - 1 < 2:
            raise KronblocksError("a search compares losses example by example: hold out at least two examples")

    def rows(self, model: nn.Module, seed: int) -> dict[str, int]:
        """How many rows of x reach each linear layer in a training step. The model and the random state stay unchanged.

        A layer that the first batch does not reach counts with the most rows of the others.
        """
        layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        with rows_reaching(layers) as rows, _same_random_state(model), torch.enable_grad(), evaluating(model):
            self.losses(model, next(self.stream(seed)))  # without gradients, attention may bypass its layers
        sums = {name: sum(map(math.prod, calls)) for name, calls in rows.items() if calls}
        return {name: sums.get(name, max(sums.values(), default=1)) for name in rows}

    def optimizer(self, model: nn.Module, steps: int) -> tuple[AdamW, OneCycleLR]:
        """AdamW with the task's rates, and one cycle of these rates over this many steps."""
        groups = parameter_groups(
            model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            factor_weight_decay=self.factor_weight_decay,
            factor_lr_scale=self.factor_lr_scale,
            tile_lr_scale=self.tile_lr_scale,
            lifted_lr_scale=self.lifted_lr_scale,
            lifted_weight_decay=self.lifted_weight_decay,
        )
        optimizer, rates = AdamW(groups), [group["lr"] for group in groups]
        return optimizer, OneCycleLR(optimizer, rates, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)

    @torch.no_grad()
    def judge(self, model: nn.Module) -> Tensor:
        """Held-out loss of every example, (N,), float64, of the model in eval mode."""
        with evaluating(model):
            losses = torch.cat([self.losses(model, batch).detach().double().flatten() for batch in self.held_out])
        if not torch.isfinite(losses).all():
            return torch.full_like(losses, torch.inf)
        return losses


def _same_random_state(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng(devices=list({p.device for p in model.parameters() if p.device.type == "cuda"}))


def steps_of_search(budget: float | None, usual: float, total_steps: int, parts: float, for_what: str) -> int:
    """Number of steps of a whole search, enough for each of its parts.

    Args:
        budget: as a share of the training that follows; None: `usual`, or more if that is too short.
        usual: share of a training that is long enough.
        total_steps: of that training.
        parts: number of parts that share the steps evenly, and need 20 each; 0 if there is nothing to compare.
        for_what: for the error, such as "each of 3 candidates in each of 3 rounds".

    Raises:
        KronblocksError: the budget leaves fewer steps.
    """
    least = math.ceil(_LEAST_STEPS * parts)
    if budget is None:
        return max(least, int(usual * total_steps))
    steps = int(budget * total_steps)
    if steps < least:
        raise KronblocksError(
            f"{budget:g} of {total_steps} steps leaves {int(steps / parts)} for {for_what}, but {_LEAST_STEPS} "
            f"are needed: give a budget of {math.ceil(100 * least / total_steps) / 100:g} or more, or none, or fewer sizes"
        )
    return steps


_LEAST_STEPS = 20


class Trial:
    """A copy of a model that trains with one config for a number of steps; call `step` with each batch.

    Args:
        model: the dense model, which stays unchanged.
        config: what `sparsify_` gets.
        task: optimiser and loss.
        steps: of the whole training; learning rate and sparsity run their full course in them.
        seed: of the factors.
    """

    def __init__(self, model: nn.Module, config: SparsityConfig, task: SearchTask, steps: int, seed: int) -> None:
        self.model, self._task = copy.deepcopy(model).train(), task
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", PerformanceWarning)  # the search finds out whether a size pays
            torch.manual_seed(seed)
            self.sparsifier = sparsify_(self.model, dataclasses.replace(config, measure_plans=False))
        self._optimizer, self._schedule = task.optimizer(self.model, steps)
        self.sparsifier.attach(self._optimizer, total_steps=steps)
        self._seconds: dict[str, list[float]] = {}

    def step(self, batch: Any) -> None:
        """One training step."""
        phase = self.sparsifier.phase
        start = time.perf_counter()
        loss = self._task.losses(self.model, batch).mean() + self.sparsifier.penalty()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        if loss.device.type != "cpu":
            torch.accelerator.synchronize(loss.device)
        self._seconds.setdefault(phase, []).append(time.perf_counter() - start)
        self._schedule.step()

    def norm(self) -> float:
        """Frobenius norm of all targeted weights together."""
        return math.sqrt(sum(float(target.layer.block_norms().double().square().sum()) for target in self.sparsifier.targets))

    @property
    def seconds_per_step(self) -> float:
        """Median time of a step in each phase, averaged over the phases by their lengths."""
        total = sum(len(each) for each in self._seconds.values())
        if not total:
            raise KronblocksError("the trial has made no step yet")
        return sum(len(each) * statistics.median(each) for each in self._seconds.values()) / total
