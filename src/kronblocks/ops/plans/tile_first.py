"""Multiply x by all tiles, then by the coefficients (equation 5): r(g/m1 + 1/bn) of dense's multiply-adds."""

from __future__ import annotations

import torch
from torch import Tensor

from kronblocks.ops.plans.plan import Plan, Stages, factored_backward_macs
from kronblocks.ops.problem import ProductSizes


def _grouped(coeff: Tensor, tiles: Tensor) -> Tensor:
    """(m1, n1, r) -> (g, m1/g, n1, r)."""
    return coeff.unflatten(0, (tiles.shape[0], -1))


def first(x: Tensor, coeff: Tensor, tiles: Tensor) -> Tensor:
    """Z, the products of x's blocks with the tiles, (rows, n1, g, r, bm)."""
    return torch.einsum("tqb,giab->tqgia", x.unflatten(1, (coeff.shape[1], -1)), tiles)


def second(x: Tensor, coeff: Tensor, tiles: Tensor, z: Tensor) -> Tensor:
    """y, the mixture of Z for each block row, (rows, m)."""
    return torch.einsum("gpqi,tqgia->tgpa", _grouped(coeff, tiles), z).flatten(1)


def backward(dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, z: Tensor, input_grad: bool):
    """All gradients: two products of the second stage's size, and one of the first's, or two with dx."""
    grouped = _grouped(coeff, tiles)
    dy = dy.view(dy.shape[0], *grouped.shape[:2], tiles.shape[2])  # (t, g, p, a)
    dcoeff = torch.einsum("tgpa,tqgia->gpqi", dy, z)
    dz = torch.einsum("gpqi,tgpa->tqgia", grouped, dy)
    dtiles = torch.einsum("tqgia,tqb->giab", dz, x.unflatten(1, (coeff.shape[1], -1)))
    dx = torch.einsum("tqgia,giab->tqb", dz, tiles).flatten(1) if input_grad else None
    return dx, dcoeff.reshape(coeff.shape), dtiles


def stages(sizes: ProductSizes) -> Stages:
    """Count: multiply every block by every tile, then mix for the live blocks."""
    tiled = sizes.rows * sizes.n1 * sizes.groups * sizes.rank * sizes.bm
    return Stages(tiled * sizes.bn, sizes.rows * sizes.live * sizes.bm * sizes.rank, tiled)


TILE_FIRST = Plan(
    "tile_first",
    is_factored=True,
    needs_live=False,
    keeps_blocks=False,
    stages=stages,
    backward_macs=factored_backward_macs,
    first=first,
    second=second,
    backward=backward,
)
