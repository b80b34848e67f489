"""What penalised rules share: a controlled shrink after every step or a growing term in the loss, and an exact cut at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.sparsity.controller import PenaltyController
from kronblocks.sparsity.rules.base import RuleContext, RuleState, cut, shrink


def _forecast(scores: Sequence[Tensor], correction: float, ctx: RuleContext) -> float:
    """The controller's penalty until the next update, for the sparsity that is wanted then."""
    flat = torch.cat([score.flatten().cpu().double() for score in scores])
    last_to_die = float(flat.kthvalue(min(len(flat), int(ctx.next_sparsity * len(flat)) + 1)).values)
    rate = sum(ctx.learning_rates) / len(ctx.learning_rates)
    return PenaltyController(correction).penalty(score=last_to_die, rate=rate, steps=ctx.steps_to_update)


def controlled_shrink(
    scores: Sequence[Tensor], state: RuleState, ctx: RuleContext, strength: float | None, *, ridge: float = 0.0
) -> tuple[list[Tensor], RuleState]:
    """Shrink by penalty * learning rate; the last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        state: the penalty and the controller's correction, empty at first.
        ctx: what the rule may know.
        strength: a fixed penalty; None leaves it to the controller.
        ridge: penalty on half the squared norm, relative to that on the norm.
    """
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity), state
    if strength is None and (ctx.is_update or not state):
        controller = PenaltyController(state.get("correction", 1.0))
        controller.update(wanted=ctx.sparsity, observed=ctx.dead_share)
        state = {"correction": controller.correction, "penalty": _forecast(scores, controller.correction, ctx)}
    penalty = state["penalty"] if strength is None else strength
    thresholds = [penalty * rate for rate in ctx.learning_rates]
    multipliers = shrink(scores, thresholds, ctx, ctx.target_sparsity)
    return [m / (1 + ridge * threshold) for m, threshold in zip(multipliers, thresholds, strict=True)], state


def cut_at_the_end(scores: Sequence[Tensor], ctx: RuleContext) -> list[Tensor]:
    """For penalties in the loss, which make no exact zeros: nothing dies before the last update, which cuts to the target."""
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity)
    return [mask.to(torch.float32) for mask in ctx.masks]


def growing_strength(strength: float | None, growth: float, ctx: RuleContext) -> float:
    """Weight of a penalty in the loss: it grows linearly over the training to `growth` times its first value, 1 unless given."""
    return (1.0 if strength is None else strength) * (1 + (growth - 1) * ctx.step / ctx.total_steps)
