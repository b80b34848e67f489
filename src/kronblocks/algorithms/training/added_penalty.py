"""A penalty's gradient, added to the parameters' own before a step, for training loops whose loss is out of reach."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronblocks.algorithms.training.nested import is_nested
from kronblocks.core.errors import KronblocksWarning


class AddedPenalty:
    """A step pre-hook.

    Args:
        penalty: gives the term of the loss.
    """

    def __init__(self, penalty: Callable[[], Tensor]) -> None:
        self._penalty = penalty

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The step's arguments, if it is given a closure, whose gradients are to have the penalty's added."""
        if is_nested(optimizer):  # its gradients, or its closure, have the penalty's already
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._add_gradients(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            self._add_gradients(optimizer)
            return loss

        others = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, with_penalty, *args[2:]), others

    @torch.no_grad()
    def _add_gradients(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to those of an optimiser's parameters; a fused one may hold scaled gradients."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with torch.enable_grad():
            term = self._penalty()
        if not parameters or not term.requires_grad:
            return
        scale = getattr(optimizer, "grad_scale", None)
        gradients = torch.autograd.grad(term, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                parameter.grad.add_(gradient if scale is None else gradient * scale)


def warn_of_missing_penalty(rule: Any) -> None:
    """Say so after a step in whose loss a rule's penalty was not."""
    warnings.warn(
        f"{type(rule).__name__} has a penalty in the loss, and penalty() was not called in this step: train on "
        "loss + sparsifier.penalty(), or attach(..., add_penalty=True)",
        KronblocksWarning,
        stacklevel=2,
    )
