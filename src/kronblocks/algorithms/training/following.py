"""Watch the optimisers of a training: zeros stay zeros, each optimiser steps, and new parameters move."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronblocks.algorithms.targets import BlockTarget
from kronblocks.core.errors import KronblocksWarning
from kronblocks.core.tables import some

_PATIENCE = 25
"""After so many steps of one optimiser alone, warn that another makes none. GANs may step one side 5 or 10 times."""
_STEPS_TO_MOVE = 10
"""Within so many steps a parameter moves if an optimiser steps it, even with warm-up and bfloat16."""


def keep_zeros_(targets: Sequence[BlockTarget], optimizer: Optimizer) -> None:
    """Set dead blocks to exactly 0 in what an optimiser has stepped; for schedule-free ones, at both of their points."""
    held, has_two_points = _held(optimizer), hasattr(optimizer, "eval")
    for target in targets:
        if any(id(p) in held for p in target.parameters()):
            target.layer.enforce_zeros_()
            if has_two_points:
                target.end_moments_([optimizer], ~target.mask)


class Turns:
    """Which optimisers the present training step waits for. Each one that holds blocks steps once in it."""

    def __init__(self, optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> None:
        self._optimizers, self._warned = list(optimizers), False
        self.begin(targets)

    def begin(self, targets: Sequence[BlockTarget]) -> None:
        """Begin a training step: wait for every optimiser that holds block parameters now."""
        self._alone = 0
        self._waited_for = {id(optimizer) for optimizer in self._optimizers}
        if len(self._optimizers) > 1:
            blocks = {id(p) for target in targets for p in target.parameters() if p.requires_grad}
            self._waited_for = {id(each) for each in self._optimizers if not blocks.isdisjoint(_held(each))} or self._waited_for

    def end(self, optimizer: Optimizer, step: int) -> bool:
        """Note that an optimiser has stepped, at this training step. Whether that ends the training step."""
        self._alone += id(optimizer) not in self._waited_for
        self._waited_for.discard(id(optimizer))
        if self._waited_for and self._alone > _PATIENCE * len(self._optimizers) and not self._warned:
            self._warned = True
            places = [place for place, each in enumerate(self._optimizers) if id(each) in self._waited_for]
            warnings.warn(
                f"the sparsifier waits at step {step}: optimiser {places[0]} of those that attach was given "
                f"({type(self._optimizers[places[0]]).__name__}) has made no step while others made {self._alone}. Each one that "
                "holds blocks has to step once in a training step",
                KronblocksWarning,
                stacklevel=2,
            )
        return not self._waited_for


class Movement:
    """Checks, in the first steps after layers were replaced, that their parameters change."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._watched = self._since = self._steps = 0

    @torch.no_grad()
    def watch(self, targets: Sequence[BlockTarget], step: int) -> None:
        """Begin to check, and note the present values."""
        self._before = {t.name: t.parameters()[0].clone() for t in targets if t.parameters()[0].requires_grad}
        self._watched, self._since, self._steps = len(self._before), step, 0

    @torch.no_grad()
    def check(self, targets: Sequence[BlockTarget], rates: Sequence[float]) -> None:
        """After a step, warn of parameters that should have changed by now. `rates` has each layer's learning rate."""
        if not self._before:
            return
        still = []
        for target, rate in zip(targets, rates, strict=True):
            now, before = target.parameters()[0], self._before.get(target.name)
            if before is None or before.shape != now.shape or not torch.equal(before, now):
                self._before.pop(target.name, None)
            elif now.grad is not None and rate * float(now.grad.abs().max()) > self._least(now):
                still.append(target.name)
        self._steps += bool(still)
        if self._steps == _STEPS_TO_MOVE:
            self._before = {}
            warnings.warn(
                f"values of {some(still)} have not changed in {_STEPS_TO_MOVE} steps "
                f"with gradients, since layers were replaced at step {self._since}: the optimiser does not step the parameters "
                "in its param_groups. Use the plain optimiser without a wrapper, or method='magnitude'",
                KronblocksWarning,
                stacklevel=2,
            )

    def _least(self, parameter: Tensor) -> float:
        """The least change that counts, above rounding; 0 if no layer has changed at all."""
        if len(self._before) == self._watched:
            return 0.0
        return 4 * torch.finfo(parameter.dtype).eps * float(parameter.abs().max())


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
