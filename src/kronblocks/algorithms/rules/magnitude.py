"""Gradual pruning: at each update the blocks of least score die until exactly the scheduled sparsity is reached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.algorithms.balance import balanced
from kronblocks.algorithms.rules.base import Rule, RuleContext, RuleState, cut
from kronblocks.algorithms.rules.regrowth import exchange
from kronblocks.algorithms.targets import Score


@final
class Magnitude(Rule):
    """Kills as many blocks as the schedule asks for. With a staircase schedule this is iterative pruning.

    Args:
        score: "norm" (block norm / sqrt(area)), "relative" (that, relative to its block row and column), "gate" or "taylor".
        regrow: share of the live blocks that is exchanged, at the first update, for dead ones of greatest gradient; falls to 0.

    Sources:
        Zhu and Gupta, "To prune, or not to prune", 2017, here for blocks instead of weights.
        In stages: Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks", 2015.
        "relative": see `balanced`.
        "taylor": Molchanov, Mallya, Tyree, Frosio, Kautz, "Importance estimation for neural network pruning", 2019.
    """

    def __init__(self, score: Score = "norm", regrow: float = 0.0) -> None:
        self.score = score
        self.needs_growth = regrow > 0
        self._regrow = regrow

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        alive = cut(scores, ctx, ctx.sparsity)
        if growth_scores is not None and self._regrow:
            if self.score == "relative":
                growth_scores = [balanced(growth, torch.ones_like(growth, dtype=torch.bool)) for growth in growth_scores]
            alive = exchange(alive, scores, growth_scores, self._regrow, ctx)
        return alive, state
