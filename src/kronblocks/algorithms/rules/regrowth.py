"""Exchange live blocks for dead ones with greater gradients (equation 19 in docs/math.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.algorithms.budget import best_of_rows
from kronblocks.algorithms.rules.base import RuleContext


def exchange(
    alive: Sequence[Tensor], scores: Sequence[Tensor], growth_scores: Sequence[Tensor], share: float, ctx: RuleContext
) -> list[Tensor]:
    """In every layer, drop the live blocks of least score and grow equally many of greatest growth score.

    Dropped blocks compete with dead ones: if their gradient is greater, they stay, with their weights. Each block row of a
    head keeps its best block. A layer without gradients stays as it is.

    Args:
        alive: (m1, n1) bool grids, the blocks that live so far.
        scores: (m1, n1) grids.
        growth_scores: (m1, n1) grids.
        share: of the live blocks that is dropped at the first update; it falls along a cosine to 0 at the last.
        ctx: the rule's context.

    Returns:
        (m1, n1) bool grids.

    Source:
        Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery: making all tickets winners", 2020; here for blocks.
    """
    now = share * 0.5 * (1 + math.cos(math.pi * ctx.fraction))
    exchanged = []
    heads = ctx.heads or [False] * len(alive)
    for live, score, growth, is_head in zip(alive, scores, growth_scores, heads, strict=True):
        if not (growth > 0).any():
            exchanged.append(live.clone())
            continue
        kept_anyway = torch.zeros_like(live)
        if is_head:
            kept_anyway = best_of_rows(score.masked_fill(~live, -1.0))
        number = min(int(now * int(live.sum())), int(live.sum()) - max(1, int(kept_anyway.sum())))
        order = score.masked_fill(~live | kept_anyway, math.inf).flatten().argsort(stable=True)
        kept = live.clone()
        kept.view(-1)[order[:number]] = False
        wanted = growth.masked_fill(kept, -1.0).flatten().argsort(descending=True, stable=True)[:number]
        exchanged.append(kept.flatten().index_fill(0, wanted, True).view(live.shape))
    return exchanged
