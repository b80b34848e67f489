"""No decisions: whatever is dead stays dead. Also the rule of the dense method, which has no targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.sparsity.rules.base import RuleContext, RuleState
from kronblocks.sparsity.targets import BlockTarget, Score


@final
class Fixed:
    """Keeps the mask that the targets had at the start.

    Source:
        Random masks as a floor: Liu et al., "The unreasonable effectiveness of random pruning", 2022.
    """

    score: Score = "norm"
    every_step = False
    needs_growth = False
    has_penalty = False

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        return [mask.to(torch.float32) for mask in ctx.masks], state

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        return None
