"""Group LASSO with one group per block, plain and elastic: as a proximal step, or in the loss as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.algorithms.rules.base import Form, Rule, RuleContext, RuleState, Strength
from kronblocks.algorithms.rules.proximal import cut_at_the_end, growing_strength, proximal_step
from kronblocks.algorithms.targets import BlockTarget


@final
class GroupLasso(Rule):
    """Penalises the norms of blocks, and with `ridge` above 0 (elastic) their squares too.

    `form="proximal"`: after every step, multiply each block by max(0, 1 - threshold / score) / (1 + ridge * threshold)
    (equation 14 in docs/math.md). Blocks reach exactly zero, and the last update cuts to the target.
    `form="gradient"`, as published: add `strength * mean(score + ridge/2 * score^2)` over all blocks to the loss. It grows
    linearly to `growth` times that. It makes no exact zeros: sparsity is 0 until the last update cuts the blocks of least norm.

    Args:
        form: "proximal" or "gradient".
        strength: of the penalty. A proximal step shrinks by strength times the learning rate, or, with "scheduled", by what
            the schedule needs (equation 18), whatever the learning rate.
        growth: factor by which the strength in the loss has grown at the end.
        ridge: strength of the squared norm, relative to that of the norm; 0 is plain group LASSO.

    Sources:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
        Elastic: Oyedotun, Aouada, Ottersten, "Structured compression of deep neural networks with debiased elastic group LASSO",
        2020. Proximal: Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.
    """

    def __init__(
        self, form: Form = "proximal", strength: Strength = "scheduled", growth: float = 3.0, *, ridge: float = 0.0
    ) -> None:
        self._strength: Strength = strength
        self._growth, self._ridge = growth, ridge
        self.every_step, self.has_penalty = form == "proximal", form == "gradient"

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        if self.has_penalty:
            return cut_at_the_end(scores, ctx), state
        return proximal_step(scores, ctx, state, self._strength, ridge=self._ridge)

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        if not self.has_penalty or ctx.phase == "heal":
            return None
        total = sum(target.grid.blocks for target in targets)
        scores = [target.differentiable_norms() / target.area**0.5 for target in targets]
        mean = torch.stack([(score + self._ridge / 2 * score.square()).sum() for score in scores]).sum() / total
        return growing_strength(self._strength, self._growth, ctx) * mean
