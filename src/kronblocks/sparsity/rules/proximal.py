"""What the proximal rules share: a controlled shrink after every step, an exact cut at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.sparsity.controller import PenaltyController
from kronblocks.sparsity.rules.base import RuleContext, RuleState, cut, shrink


def _forecast(scores: Sequence[Tensor], correction: float, ctx: RuleContext) -> float:
    """The controller's penalty until the next update."""
    flat = torch.cat([score.flatten().cpu().double() for score in scores])
    last_to_die = float(flat.kthvalue(min(len(flat), int(ctx.target_sparsity * len(flat)) + 1)).values)
    rate = sum(ctx.learning_rates) / len(ctx.learning_rates)
    return PenaltyController(correction).penalty(score=last_to_die, rate=rate, steps=ctx.steps_left)


def controlled_shrink(
    scores: Sequence[Tensor], state: RuleState, ctx: RuleContext, strength: float | None
) -> tuple[list[Tensor], RuleState]:
    """Shrink by penalty * learning rate; the last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        state: the penalty and the controller's correction, empty at first.
        ctx: what the rule may know.
        strength: a fixed penalty; None leaves it to the controller.
    """
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity), state
    if strength is not None:
        return shrink(scores, [strength * rate for rate in ctx.learning_rates], ctx, ctx.target_sparsity), state
    if ctx.is_update or not state:
        controller = PenaltyController(state.get("correction", 1.0))
        controller.update(wanted=ctx.sparsity, observed=ctx.dead_share)
        state = {"correction": controller.correction, "penalty": _forecast(scores, controller.correction, ctx)}
    thresholds = [state["penalty"] * rate for rate in ctx.learning_rates]
    return shrink(scores, thresholds, ctx, ctx.target_sparsity), state
