"""Add a penalty's gradient to those of the parameters before a step, for training loops whose loss cannot be changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kronblocks.algorithms.training.nested import is_nested
from kronblocks.core.errors import KronblocksWarning


class AddedPenalty:
    """A step pre-hook that adds the gradient of `penalty()`."""

    def __init__(self, penalty: Callable[[], Tensor]) -> None:
        self._penalty = penalty

    def attach_(self, optimizers: Sequence[Optimizer]) -> list[RemovableHandle]:
        """Hook these optimisers' steps. Returns the hooks' handles."""
        before: Any = torch.compiler.disable(self.before_step)
        return [optimizer.register_step_pre_hook(before) for optimizer in optimizers]

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook. If the step has a closure, return the step's arguments with a closure that adds the gradient."""
        if is_nested(optimizer):  # the outer step has added it
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
        return (*args[:1], with_penalty, *args[2:]), others

    @torch.no_grad()
    def _add_gradients(self, optimizer: Optimizer) -> None:
        """Add the penalty's gradient to an optimiser's parameters. Gradients of a fused optimiser may be scaled."""
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
    """Warn after a step without a call of `penalty()`."""
    warnings.warn(
        f"{type(rule).__name__} has a penalty in the loss, and penalty() was not called in this step: train on "
        "loss + sparsifier.penalty(), or attach(..., add_penalty=True)",
        KronblocksWarning,
        stacklevel=2,
    )
