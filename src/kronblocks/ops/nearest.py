"""The sum of Kronecker products nearest to a given weight, and the canonical form of one."""

from __future__ import annotations

import torch
from torch import Tensor

from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import KronblocksError
from kronblocks.ops.operands import check_factors


def _signs(tiles: Tensor) -> Tensor:
    """+1 or -1 per tile, (g, r, 1): the sign of its entry of largest magnitude; tiles (g, r, area)."""
    largest = tiles.gather(2, tiles.abs().argmax(2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(tiles.dtype)


def nearest_kronecker_sum(weight: Tensor, grid: BlockGrid, rank: int, *, tile_groups: int = 1) -> tuple[Tensor, Tensor, float]:
    """The coefficients and tiles whose sum of Kronecker products is nearest to a weight (equation 11 in docs/math.md).

    It is exact if the rank suffices, at the latest at `bm*bn`. The result is in canonical form: orthonormal tiles, norms in the
    coefficients, ordered by singular value. Terms beyond the possible rank are zero.

    Args:
        weight: (out_features, in_features).
        grid: how the weight is cut into blocks.
        rank: number of Kronecker terms, at least 1.
        tile_groups: number of tile banks; divides the block rows.

    Returns:
        coeff (m1, n1, r), tiles (g, r, bm, bn), and the relative error |W - sum| / |W| in the Frobenius norm.

    Raises:
        KronblocksError: the weight is not finite, or the shapes do not fit.

    Source:
        Van Loan and Pitsianis, "Approximation with Kronecker products", 1993.
    """
    if tuple(weight.shape) != (grid.out_features, grid.in_features):
        raise KronblocksError(f"the weight is {tuple(weight.shape)}, but the grid is for {grid}")
    if not torch.isfinite(weight).all():
        raise KronblocksError("the weight has values that are not finite (NaN or infinity): fix or reinitialise it first")
    (m1, n1), (bm, bn) = grid.shape, grid.block
    if rank < 1 or tile_groups < 1 or m1 % tile_groups:
        raise KronblocksError(
            f"rank {rank} and tile_groups {tile_groups} must be at least 1, and tile_groups divide {m1} block rows"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    blocks = grid.to_blocks(weight.detach().to(dtype)).reshape(tile_groups, -1, bm * bn)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    kept = min(rank, s.shape[1])
    signs = _signs(vh[:, :kept])
    coeff = weight.new_zeros(tile_groups, blocks.shape[1], rank, dtype=dtype)
    tiles = weight.new_zeros(tile_groups, rank, bm * bn, dtype=dtype)
    coeff[:, :, :kept] = u[:, :, :kept] * s[:, None, :kept] * signs.transpose(1, 2)
    tiles[:, :kept] = vh[:, :kept] * signs
    total = torch.linalg.vector_norm(s)
    error = float(torch.linalg.vector_norm(s[:, kept:]) / total) if total > 0 else 0.0
    return coeff.view(m1, n1, rank).to(weight.dtype), tiles.view(tile_groups, rank, bm, bn).to(weight.dtype), error


@torch.no_grad()
def spectrum(weight: Tensor, grid: BlockGrid, tile_groups: int) -> Tensor:
    """Squared error that each Kronecker term removes, largest first, as shares of |W|^2; (at most bm*bn,) float64.

    Computed from eigenvalues of each group's second moments, (bm*bn, bm*bn), without an SVD of the whole weight.
    """
    blocks = grid.to_blocks(weight.detach()).reshape(tile_groups, -1, grid.block.area).double()
    wide = blocks.shape[1] < blocks.shape[2]
    moments = blocks @ blocks.transpose(1, 2) if wide else blocks.transpose(1, 2) @ blocks
    squares = torch.linalg.eigvalsh(moments).clamp_min(0).flip(1).sum(0)
    total = squares.sum()
    return squares / total if total > 0 else squares


def captured_energy(weight: Tensor, grid: BlockGrid, rank: int, tile_groups: int = 1) -> float:
    """Share of |W|^2 that the nearest sum of `rank` Kronecker products keeps (equation 11); 1 for a weight of zeros."""
    squares = spectrum(weight, grid, tile_groups)
    return float(squares[:rank].sum()) if squares.any() else 1.0


def canonical_form(coeff: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same W with orthonormal tiles per group, norms in the coefficients, largest term first (equation 12).

    Do not use it in the middle of a training: the optimiser's moments would no longer fit.

    Raises:
        KronblocksError: the rank is above bm*bn, where no orthonormal tiles exist, or the shapes do not fit together.
    """
    check_factors(coeff, tiles)
    groups, rank, bm, bn = tiles.shape
    if rank > bm * bn:
        raise KronblocksError(f"no {rank} orthonormal tiles exist in blocks of {bm}x{bn}: the rank must be at most {bm * bn}")
    dtype = torch.promote_types(tiles.dtype, torch.float32)
    q, r = torch.linalg.qr(tiles.to(dtype).flatten(2).transpose(1, 2))  # (g, area, r), (g, r, r)
    mixed = coeff.to(dtype).reshape(groups, -1, rank) @ r.transpose(1, 2)
    if mixed.shape[1] < rank:  # fewer blocks than terms: pad, so that the SVD gives all r terms
        mixed = torch.nn.functional.pad(mixed, (0, 0, 0, rank - mixed.shape[1]))
    u, s, vh = torch.linalg.svd(mixed, full_matrices=False)
    flat = vh @ q.transpose(1, 2)
    signs = _signs(flat)
    new_coeff = (u * s[:, None, :] * signs.transpose(1, 2))[:, : coeff.shape[0] // groups * coeff.shape[1]]
    return new_coeff.reshape(coeff.shape).to(coeff.dtype), (flat * signs).view(tiles.shape).to(tiles.dtype)
