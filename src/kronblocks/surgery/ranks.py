"""Choose the rank of each layer of a trained model by the spectrum of its rearranged weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from kronblocks.config.ranks import RankChoice
from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import DoesNotFit
from kronblocks.ops.nearest import spectrum


def _errors(squares: Tensor) -> list[float]:
    """The relative errors with 1, 2, ... terms."""
    return [math.sqrt(max(0.0, float(squares[rank:].sum()))) for rank in range(1, len(squares) + 1)]


def _least_rank(squares: Tensor, max_error: float) -> int:
    """The least rank within an error, with a margin for rounding of the spectrum (float64, squared)."""
    return next((rank for rank, error in enumerate(_errors(squares), 1) if error <= max_error + 1e-7), len(squares))


def _within_budget(spectra: Sequence[Tensor], costs: Sequence[int], budget: float) -> list[int]:
    """Give each term in turn to the layer where it removes most squared error per parameter."""
    ranks = [1] * len(spectra)
    left = budget - sum(costs)
    if left < 0:
        raise DoesNotFit(
            f"one Kronecker term in every layer has {sum(costs)} parameters already, above the {int(budget)} that max_parameters "
            "allows: raise it, or use larger blocks or fewer tile groups"
        )
    while True:
        gains = [
            (float(squares[rank]) / cost, -index)
            for index, (squares, rank, cost) in enumerate(zip(spectra, ranks, costs, strict=True))
            if rank < len(squares) and cost <= left
        ]
        if not gains or max(gains)[0] <= 0:
            return ranks
        best = -max(gains)[1]
        ranks[best] += 1
        left -= costs[best]


def choose_ranks(choice: RankChoice, layers: Sequence[tuple[Tensor, BlockGrid, int]]) -> list[int]:
    """The rank of each layer.

    A budget counts errors relative to each layer's weight, so small layers are not neglected.

    Args:
        choice: the criterion.
        layers: for each layer its weight (out_features, in_features), its grid, and its number of tile banks.

    Raises:
        DoesNotFit: one term per layer already exceeds the budget.

    >>> import torch
    >>> from kronblocks.core.blocks import BlockSize
    >>> weight = torch.kron(torch.eye(4), torch.eye(2)) + torch.kron(torch.ones(4, 4), torch.ones(2, 2))
    >>> choose_ranks(RankChoice(max_error=0.01), [(weight, BlockGrid.fit(8, 8, BlockSize(2, 2)), 1)])
    [2]
    """
    spectra = [spectrum(*layer) for layer in layers]
    if choice.max_error is not None:
        return [_least_rank(squares, choice.max_error) for squares in spectra]
    assert choice.max_parameters is not None
    costs = [grid.blocks + tile_groups * grid.block.area for _, grid, tile_groups in layers]
    return _within_budget(spectra, costs, choice.max_parameters * sum(grid.weights for _, grid, _ in layers))
