"""What optimisers remember of a parameter, and how a part of it begins anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.shards import summed

_DIRECTIONS = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev", "ax"})
"""What torch's optimisers call averages of gradients or weights; all else that has no sign sets the length of a step."""


def moments(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    """What optimisers remember of a parameter in tensors of its shape, with its names."""
    states = [optimizer.state[parameter] for optimizer in optimizers if parameter in optimizer.state]
    tensors = [(name, value) for state in states for name, value in state.items() if isinstance(value, Tensor)]
    return [(name, value) for name, value in tensors if value.shape == parameter.shape]


def restart_(name: str, moment: Tensor, local: Tensor, blocks: Tensor, others: Tensor) -> None:
    """Restart the part of a moment that belongs to some blocks: directions at zero, the others at the mean of other blocks.

    Where the moment is sharded, every process that holds rows of it has to call this, with its own.

    Args:
        name: what the optimiser calls it.
        moment: all of it, of its parameter's shape, perhaps sharded.
        local: the rows of it that this process holds; changed in place.
        blocks: bool, broadcastable to `local`: entries of the blocks that restart.
        others: bool, broadcastable to `local`: entries of the live blocks beside them.
    """
    if name in _DIRECTIONS:
        local.masked_fill_(blocks, 0)
        return
    others = others.expand_as(local)
    wide = torch.promote_types(local.dtype, torch.float32)  # numbers of entries are beyond what half precision counts to
    parts = (local.masked_fill(~others, 0), others, local < 0)
    total, number, negative = summed(torch.stack([part.sum(dtype=wide) for part in parts]), moment)
    mean = torch.where(negative > 0, 0, total / number.clamp_min(1))  # what has a sign is a direction under another name
    local.masked_fill_(blocks, mean.to(local.dtype))
