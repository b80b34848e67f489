"""Multiply x by the coefficients, then by the tiles (equation 6): r(1/bm + 1/n1) of dense's multiply-adds.

More tile banks (up to `tile_groups = m1`) cost nothing here, since each block row uses only its group's tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronblocks.ops.plans.plan import Plan, Stages, factored_backward_macs
from kronblocks.ops.problem import ProductSizes


def first(x: Tensor, coeff: Tensor, tiles: Tensor) -> Tensor:
    """U, the mixtures of x's blocks, (rows, g, m1/g, r, bn)."""
    u = torch.einsum("pqi,tqb->tpib", coeff, x.unflatten(1, (coeff.shape[1], -1)))
    return u.unflatten(1, (tiles.shape[0], -1))


def second(x: Tensor, coeff: Tensor, tiles: Tensor, u: Tensor) -> Tensor:
    """y, the product of U with the tiles, (rows, m)."""
    return torch.einsum("giab,tgpib->tgpa", tiles, u).flatten(1)


def backward(dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, u: Tensor, input_grad: bool):
    """All gradients: two products of the second stage's size, and one of the first's, or two with dx."""
    groups, _, bm, _ = tiles.shape
    blocks = x.unflatten(1, (coeff.shape[1], -1))  # (t, q, b)
    dy = dy.view(dy.shape[0], groups, coeff.shape[0] // groups, bm)  # (t, g, p, a)
    dtiles = torch.einsum("tgpa,tgpib->giab", dy, u)
    du = torch.einsum("tgpa,giab->tgpib", dy, tiles).flatten(1, 2)  # (t, p, i, b)
    dcoeff = torch.einsum("tpib,tqb->pqi", du, blocks)
    dx = torch.einsum("pqi,tpib->tqb", coeff, du).flatten(1) if input_grad else None
    return dx, dcoeff, dtiles


def stages(sizes: ProductSizes) -> Stages:
    """Count: mix the live blocks, then multiply every mixture by its tile."""
    mixtures = sizes.rows * sizes.m1 * sizes.rank * sizes.bn
    return Stages(sizes.rows * sizes.live * sizes.bn * sizes.rank, mixtures * sizes.bm, mixtures)


COEFF_FIRST = Plan(
    "coeff_first",
    is_factored=True,
    needs_live=False,
    keeps_blocks=False,
    stages=stages,
    backward_macs=factored_backward_macs,
    first=first,
    second=second,
    backward=backward,
)
