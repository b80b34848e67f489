"""Group LASSO with one group a block, in its proximal form: blocks shrink by a constant and reach exactly zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from kronblocks.sparsity.rules.base import RuleContext, RuleState
from kronblocks.sparsity.rules.proximal import controlled_shrink
from kronblocks.sparsity.targets import BlockTarget


@final
class GroupLasso:
    """After every step each block is multiplied by max(0, 1 - penalty * rate / score) (equation 14 in docs/math.md).

    The last update cuts to the target exactly; after it nothing shrinks any more.

    Args:
        strength: a fixed penalty; None: a controller makes the sparsity follow the schedule.

    Source:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006; proximal form: Parikh and
        Boyd, "Proximal Algorithms", 2014, section 6.5.
    """

    score = "norm"
    every_step = True
    needs_growth = False
    has_penalty = False

    def __init__(self, strength: float | None = None) -> None:
        self._strength = strength

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        return controlled_shrink(scores, state, ctx, self._strength)

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        return None
