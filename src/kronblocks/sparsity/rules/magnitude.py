"""Gradual pruning: at each update the blocks of least score die until the scheduled sparsity is reached, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from kronblocks.sparsity.rules.base import RuleContext, RuleState, cut
from kronblocks.sparsity.targets import BlockTarget


@final
class Magnitude:
    """Score: block norm / sqrt(area). Dead blocks stay dead.

    Source:
        Zhu and Gupta, "To prune, or not to prune", 2017, with blocks for weights.
    """

    score = "norm"
    every_step = False
    needs_growth = False
    has_penalty = False

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        return cut(scores, ctx, ctx.sparsity), state

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        return None
