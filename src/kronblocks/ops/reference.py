"""The formulas written out: slow, plain, and what every test compares with. Run it in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def kron_weight(coeff: Tensor, tiles: Tensor) -> Tensor:
    """W = sum_i A_i kron B_i for every group of block rows (equations 1 and 2 in docs/math.md).

    Args:
        coeff: (m1, n1, r), already multiplied by the gate if there is one.
        tiles: (g, r, bm, bn), g divides m1.

    Returns:
        (m1*bm, n1*bn).
    """
    groups, rank = tiles.shape[:2]
    rows = coeff.shape[0] // groups
    bands = []
    for group in range(groups):
        own = coeff[group * rows : (group + 1) * rows]
        bands.append(sum(torch.kron(own[:, :, i].contiguous(), tiles[group, i].contiguous()) for i in range(rank)))
    return torch.cat(bands)


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None = None, live: Tensor | None = None) -> Tensor:
    """y = x W^T + bias without dead blocks (equation 3); x (..., n) -> (..., m)."""
    if live is not None:
        coeff = coeff * live.unsqueeze(-1)
    y = x @ kron_weight(coeff, tiles).T
    return y if bias is None else y + bias


def block_norms(coeff: Tensor, tiles: Tensor) -> Tensor:
    """Frobenius norm of every block of W, (m1, n1), by building W."""
    (m1, n1), (bm, bn) = coeff.shape[:2], tiles.shape[2:]
    return kron_weight(coeff, tiles).reshape(m1, bm, n1, bn).pow(2).sum((1, 3)).sqrt()


def packed_weight(values: Tensor, positions: list[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """The weight whose block at `positions[k]` is `values[k]` (equation 7), zero elsewhere."""
    bm, bn = values.shape[1:]
    weight = values.new_zeros(grid[0] * bm, grid[1] * bn)
    for k, (p, q) in enumerate(positions):
        weight[p * bm : (p + 1) * bm, q * bn : (q + 1) * bn] = values[k]
    return weight
