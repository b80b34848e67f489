"""What optimisers remember of a parameter, and how a part of it begins anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.shards import summed

_SCALES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "exp_inf"})
"""What torch's optimisers call the moments that they divide a step by."""


def moments(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    """What optimisers remember of a parameter in tensors of its shape, with its names."""
    states = [optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state]
    moments = [(name, value) for state in states for name, value in state.items() if isinstance(value, Tensor)]
    return [(name, value) for name, value in moments if value.shape == parameter.shape]


def restart_(name: str, moment: Tensor, local: Tensor, blocks: Tensor, others: Tensor) -> None:
    """Restart the part of a moment that belongs to some blocks.

    Args:
        name: of the moment.
        moment: all of it.
        local: what this process holds of it.
        blocks: bool, broadcastable to `local`, those that restart.
        others: bool, the same, the live blocks beside them.
    """
    if name not in _SCALES:
        local.masked_fill_(blocks, 0)
        return
    others = others.expand_as(local)
    here = torch.stack([local.masked_fill(~others, 0).sum(), others.sum().to(local.dtype)])
    total, number = summed(here, moment)
    local.masked_fill_(blocks, total / number.clamp_min(1))
