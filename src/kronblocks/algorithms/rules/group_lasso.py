"""Group LASSO with one group per block, plain and elastic: as a proximal step, or in the loss as published."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from kronblocks.algorithms.rules.proximal import Penalised
from kronblocks.algorithms.targets import BlockTarget


@final
class GroupLasso(Penalised):
    """Penalises the norms of blocks, and with `ridge` above 0 (elastic) their squares too.

    `form="proximal"`: after every step, multiply each block by max(0, 1 - threshold / score) / (1 + ridge * threshold)
    (equation 14 in docs/math.md). Blocks reach exactly zero, and the last update cuts to the target.
    `form="gradient"`, as published: add `strength * mean(score + ridge/2 * score^2)` over all blocks to the loss. It grows
    linearly to `growth` times that. It makes no exact zeros: sparsity is 0 until the last update cuts the blocks of least norm.

    `Penalised` documents the arguments.

    Sources:
        Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006.
        Elastic: Oyedotun, Aouada, Ottersten, "Structured compression of deep neural networks with debiased elastic group LASSO",
        2020. Proximal: Parikh and Boyd, "Proximal algorithms", 2014, section 6.5.
    """

    def mean_penalty(self, targets: Sequence[BlockTarget]) -> Tensor:
        total = sum(target.grid.blocks for target in targets)
        scores = [target.differentiable_norms() / target.area**0.5 for target in targets]
        return torch.stack([(score + self._ridge / 2 * score.square()).sum() for score in scores]).sum() / total
