"""What optimisers do in a training: they keep zeros, each makes its step, and parameters move after layers were replaced."""

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
"""Steps that one optimiser makes alone before it is said that another makes none; GANs give one side 5 or 10."""
_STEPS_TO_MOVE = 10
"""Steps in which a parameter moves that an optimiser steps, warm-up and bfloat16 included."""


def keep_zeros_(targets: Sequence[BlockTarget], optimizer: Optimizer) -> None:
    """Put dead blocks back to exactly 0 in what an optimiser has stepped, at both points of one that evaluates elsewhere."""
    held, has_two_points = _held(optimizer), hasattr(optimizer, "eval")
    for target in targets:
        if any(id(p) in held for p in target.parameters()):
            target.layer.enforce_zeros_()
            if has_two_points:
                target.end_moments_([optimizer], ~target.mask)


class Turns:
    """Which optimisers the present training step waits for: each that holds blocks steps once in it.

    Args:
        optimizers: all that are followed.
        targets: the layers.
    """

    def __init__(self, optimizers: Sequence[Optimizer], targets: Sequence[BlockTarget]) -> None:
        self._optimizers, self._warned = list(optimizers), False
        self.begin(targets)

    def begin(self, targets: Sequence[BlockTarget]) -> None:
        """Wait for all of them again; those whose parameters the lift took away, or that hold others only, no more."""
        self._alone = 0
        self._waited_for = {id(optimizer) for optimizer in self._optimizers}
        if len(self._optimizers) > 1:
            blocks = {id(p) for target in targets for p in target.parameters() if p.requires_grad}
            self._waited_for = {id(each) for each in self._optimizers if not blocks.isdisjoint(_held(each))} or self._waited_for

    def end(self, optimizer: Optimizer, step: int) -> bool:
        """Whether the training step is over with this optimiser's.

        Args:
            optimizer: the one that has stepped.
            step: training steps before this one, for the warning.
        """
        self._alone += id(optimizer) not in self._waited_for
        self._waited_for.discard(id(optimizer))
        if self._waited_for and self._alone > _PATIENCE * len(self._optimizers) and not self._warned:
            self._warned = True
            places = [place for place, each in enumerate(self._optimizers) if id(each) in self._waited_for]
            warnings.warn(
                f"the sparsifier stands at step {step}: optimiser {places[0]} of those that attach was given "
                f"({type(self._optimizers[places[0]]).__name__}) has made no step while others made {self._alone}, and each that "
                "holds blocks has to step once in a training step",
                KronblocksWarning,
                stacklevel=2,
            )
        return not self._waited_for


class Movement:
    """Looks, in the first steps after layers were replaced, whether their parameters change at all."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._watched = self._since = self._steps = 0

    @torch.no_grad()
    def watch(self, targets: Sequence[BlockTarget], step: int) -> None:
        """Begin, with what the layers hold now."""
        self._before = {t.name: t.parameters()[0].clone() for t in targets if t.parameters()[0].requires_grad}
        self._watched, self._since, self._steps = len(self._before), step, 0

    @torch.no_grad()
    def check(self, targets: Sequence[BlockTarget], rates: Sequence[float]) -> None:
        """Look again, after a step, and warn of those that should have changed by now.

        Args:
            targets: the layers.
            rates: learning rate of each.
        """
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
                f"with gradients, since layers were replaced at step {self._since}: the optimiser steps others than its "
                "param_groups hold. Use the plain optimiser without what is around it, or method='magnitude'",
                KronblocksWarning,
                stacklevel=2,
            )

    def _least(self, parameter: Tensor) -> float:
        """A change that rounding does not swallow; where no layer at all has changed, any."""
        if len(self._before) == self._watched:
            return 0.0
        return 4 * torch.finfo(parameter.dtype).eps * float(parameter.abs().max())


def _held(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
