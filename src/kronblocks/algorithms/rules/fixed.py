"""Fixed: a rule without decisions, for static masks and for the dense method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from kronblocks.algorithms.rules.base import Rule, RuleContext, RuleState


@final
class Fixed(Rule):
    """Keeps the masks that the targets had at the start.

    Source:
        Random masks as a floor: Liu et al., "The unreasonable effectiveness of random pruning", 2022.
    """

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        return list(ctx.masks), state
