"""What an optimiser remembers of factors, for the free values that they become: without it the lift would be a shock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kronblocks.algorithms.moments import with_inner
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear

State = dict[str, Any]

_SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
"""Names of averages or sums of squared gradients."""
_DIRECTIONS = frozenset({"exp_avg", "momentum_buffer", "grad_avg"})


@torch.no_grad()
def carried_states(optimizers: Sequence[Optimizer], old: BlockLayer, new: BlockLayer) -> list[tuple[Optimizer, State]]:
    """The states of the values of a lifted layer, of the optimisers that remember its coefficients.

    Second moments follow from those of the coefficients (equation 30 in docs/math.md), and numbers of steps go on. First
    moments start at zero. An optimiser is left out, so that it begins anew, if it remembers anything else.
    """
    if not isinstance(old, KroneckerBlockLinear) or not isinstance(new, BlockSparseLinear):
        return []
    known = [(each, each.state[old.coeff]) for each in with_inner(optimizers) if old.coeff in each.state]
    states = [(optimizer, lifted_state(state, old, new)) for optimizer, state in known]
    return [(optimizer, state) for optimizer, state in states if state is not None]


@torch.no_grad()
def lifted_state(state: State, old: KroneckerBlockLinear, new: BlockSparseLinear) -> State | None:
    """What an optimiser that has this state of a layer's coefficients should remember of its values; None: nothing."""
    lifted: State = {}
    for name, value in state.items():
        is_moment = type(value) is Tensor and value.shape == old.coeff.shape
        if is_moment and name in _DIRECTIONS:
            lifted[name] = torch.zeros_like(new.values, dtype=value.dtype)
        elif is_moment and name in _SQUARES:
            lifted[name] = _squares(value, old)[old.block_mask].to(value.dtype).view(-1, 1, 1).repeat(1, *new.grid.block)
        elif value is None or isinstance(value, bool | int | float | str) or (isinstance(value, Tensor) and value.dim() == 0):
            lifted[name] = value.clone() if isinstance(value, Tensor) else value
        else:
            return None
    return lifted if _SQUARES & lifted.keys() and len(new.values) else None


def _squares(moment: Tensor, old: KroneckerBlockLinear) -> Tensor:
    """The mean squared gradient of a weight in each block, (m1, n1), from those of coefficients, (m1, n1, r)."""
    norms = old.tiles.detach().float().square().sum((2, 3)).repeat_interleave(old.grid.shape[0] // old.tile_groups, 0)
    scale = norms.unsqueeze(1) if old.gate is None else norms.unsqueeze(1) * old.gate.detach().float().square().unsqueeze(-1)
    squares = torch.where(scale > 0, moment.float() / scale, 0).mean(-1)
    live = squares[old.block_mask]
    return torch.where(squares > 0, squares, live.mean())  # a block without gradients so far: as the others
