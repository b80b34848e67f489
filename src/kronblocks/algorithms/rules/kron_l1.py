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

    `form="gradient"`, as published: add `strength * mean|S|` to the loss. It grows linearly to `growth` times that. It makes no
    exact zeros: sparsity is 0 until the last update cuts the gates of least magnitude.
    `form="proximal"`: gates shrink after every step, to exact zeros, by `strength` times the learning rate. With
    `strength="scheduled"` they shrink by what the schedule needs (equation 18).

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
        if not gates:  # all layers are lifted
            return None
        sums = [gate.abs().sum(dtype=torch.promote_types(gate.dtype, torch.float32)) for gate in gates]  # fp16 overflows
        magnitude = torch.stack(sums).sum() / sum(gate.numel() for gate in gates)
        return growing_strength(self._strength, self._growth, ctx) * magnitude
