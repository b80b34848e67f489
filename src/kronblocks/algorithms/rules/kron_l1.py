"""The paper's rule: an L1 penalty on the gate S, in the loss or as a proximal step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.algorithms.rules.base import Form, Strength
from kronblocks.algorithms.rules.proximal import Penalised
from kronblocks.algorithms.targets import BlockTarget


@final
class KronL1(Penalised):
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
        super().__init__(form, strength, growth)

    def mean_penalty(self, targets: Sequence[BlockTarget]) -> Tensor | None:
        gates = [gate for target in targets if (gate := target.gate) is not None]
        if not gates:  # all layers are lifted
            return None
        sums = [gate.abs().sum(dtype=torch.promote_types(gate.dtype, torch.float32)) for gate in gates]  # fp16 overflows
        return torch.stack(sums).sum() / sum(gate.numel() for gate in gates)
