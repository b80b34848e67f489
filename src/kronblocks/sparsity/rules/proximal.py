"""What the proximal rules share: a controlled shrink after every step, an exact cut at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.sparsity.controller import PenaltyController
from kronblocks.sparsity.rules.base import RuleContext, RuleState, cut, shrink


def _first_penalty(scores: Sequence[Tensor], ctx: RuleContext) -> float:
    """The penalty that would shrink a median block to zero over the pruning span at the present rate."""
    median = float(torch.cat([score.flatten().cpu() for score in scores]).median())
    rate = max(sum(ctx.learning_rates) / len(ctx.learning_rates), 1e-12)
    return max(median, 1e-12) / (rate * ctx.pruning_steps)


def controlled_shrink(
    scores: Sequence[Tensor], state: RuleState, ctx: RuleContext, penalty: float | None
) -> tuple[list[Tensor], RuleState]:
    """Shrink by penalty * learning rate; the last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        state: the controller's numbers, empty at first.
        ctx: what the rule may know.
        penalty: where the controller starts; None lets it find a start from the scores.
    """
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity), state
    controller = PenaltyController(state.get("penalty") or penalty or _first_penalty(scores, ctx), initial=state.get("initial"))
    if ctx.is_update:
        controller.update(wanted=ctx.sparsity, observed=ctx.dead_share)
    thresholds = [controller.penalty * rate for rate in ctx.learning_rates]
    return shrink(scores, thresholds, ctx, ctx.target_sparsity), dict(controller.state_dict())
