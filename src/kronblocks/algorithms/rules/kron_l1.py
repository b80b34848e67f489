"""The paper's rule: an L1 penalty on the gate S, in the loss or as a proximal step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.algorithms.rules.base import Form, Rule, RuleContext, RuleState, Strength
from kronblocks.algorithms.rules.proximal import cut_at_the_end, growing_strength, proximal_step
from kronblocks.algorithms.targets import BlockTarget


@final
class KronL1(Rule):
    """L1 on the gate (equation 15 in docs/math.md).

    `form="gradient"`, the published one: `strength * mean|S|` in the loss, growing linearly to `growth` times that over the
    training. A gradient step makes no exact zeros, so the last update cuts the gates of least magnitude to hit the target: until
    then the reported sparsity is 0, which is the truth. `form="proximal"`: gates shrink after every step, to exact zeros, by
    what the schedule wants (equation 18) with `strength="scheduled"`, else by `strength` times the learning rate.

    Source:
        Zhu, Zuo, Khalili, TMLR 2025, sections 3 and 5.
    """

    score = "gate"

    def __init__(self, form: Form = "gradient", strength: Strength = 1.0, growth: float = 3.0) -> None:
        self._form, self._growth = form, growth
        self._strength: Strength = strength
        self.every_step, self.has_penalty = form == "proximal", form == "gradient"

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        if self._form == "proximal":
            return proximal_step(scores, ctx, state, self._strength)
        return cut_at_the_end(scores, ctx), state

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        if not self.has_penalty or ctx.phase == "heal":
            return None
        gates = [gate for target in targets if (gate := target.gate) is not None]
        if not gates:  # all layers have been lifted
            return None
        sums = [gate.abs().sum(dtype=torch.promote_types(gate.dtype, torch.float32)) for gate in gates]  # fp16 ends at 65,504
        magnitude = torch.stack(sums).sum() / sum(gate.numel() for gate in gates)
        return growing_strength(self._strength, self._growth, ctx) * magnitude
