"""RigL for blocks: the number of live blocks is constant, and some are exchanged at each mask update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from kronblocks.algorithms.rules.base import Rule, RuleContext, RuleState
from kronblocks.algorithms.rules.regrowth import exchange
from kronblocks.core.errors import KronblocksError


@final
class Rigl(Rule):
    """Drops blocks of least norm and grows dead ones of greatest gradient norm. They start at zero, with new moments.

    The targets must have the target sparsity from the start.

    Args:
        drop_fraction: share of a layer's live blocks that is dropped at the first update; it falls to 0 along a cosine.

    Source:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery: making all tickets winners", 2020; here for blocks.
    """

    needs_growth = True

    def __init__(self, drop_fraction: float = 0.3) -> None:
        self._drop_fraction = drop_fraction

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        if growth_scores is None:
            raise KronblocksError("RigL needs growth scores (gradient norms of dead blocks): call it at mask updates only")
        return exchange(ctx.masks, scores, growth_scores, self._drop_fraction, ctx), state
