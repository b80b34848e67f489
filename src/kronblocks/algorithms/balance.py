"""Scores relative to their block row and block column, so that what survives reaches every input and every output."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 3
"""Of dividing by the means of rows, then of columns. Later rounds change scores by a few per cent."""
_BY_NORM = 1e-3
"""How much more the block of greatest norm counts at last."""


def balanced(score: Tensor, live: Tensor) -> Tensor:
    """Scores divided by the mean of the live ones of their block row, then of their block column, in turns (equation 29).

    The weights of a layer grow together with the size of its inputs and of its gradients. By norm alone, blocks of few rows and
    columns survive, and the others lose all of theirs. Live blocks of a row or column that are all zero stay zero.

    Args:
        score: (m1, n1), from 0 on.
        live: (m1, n1) bool; the scores of others are 0 in the result.

    Sources:
        Sinkhorn and Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", 1967, for the scaling.
        Zhang, Bai, Lin, Zhao, Hou, Cannistraci, "Plug-and-play: an efficient post-training pruning method for large language
        models" (RIA), 2024, for weights relative to their row and column.

    >>> balanced(torch.tensor([[1.0, 3.0], [100.0, 100.0]]), torch.ones(2, 2, dtype=torch.bool)).mul(10).round().tolist()
    [[7.0, 13.0], [13.0, 7.0]]
    """
    scaled = torch.where(live, score, 0).double()
    for dim in (1, 0) * _ROUNDS:
        mean = scaled.sum(dim, keepdim=True) / live.sum(dim, keepdim=True).clamp_min(1)
        scaled = torch.where(mean > 0, scaled / mean, scaled)
    top = score.max()  # where balance leaves equals, as in a grid of 2 x 2, the norm decides, not rounding
    return (scaled * (1 + _BY_NORM * score.double() / top)).to(score.dtype) if top > 0 else scaled.to(score.dtype)
