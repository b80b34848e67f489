"""Build W, (m, n), then one dense product (equation 4): 1 + r/T of dense's multiply-adds."""

from __future__ import annotations

from torch import Tensor

from kronblocks.ops.plans.plan import Plan, Stages
from kronblocks.ops.problem import ProductSizes


def build_blocks(coeff: Tensor, tiles: Tensor) -> Tensor:
    """Every block of W, (m1, n1, bm, bn)."""
    groups, rank, bm, bn = tiles.shape
    blocks = coeff.reshape(groups, -1, rank) @ tiles.reshape(groups, rank, bm * bn)
    return blocks.view(*coeff.shape[:2], bm, bn)


def first(x: Tensor | None, coeff: Tensor, tiles: Tensor) -> Tensor:
    """W, (m, n)."""
    blocks = build_blocks(coeff, tiles)
    return blocks.transpose(1, 2).reshape(blocks.shape[0] * blocks.shape[2], -1)


def second(x: Tensor, coeff: Tensor, tiles: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T."""
    return x @ weight.t()


def backward(dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, weight: Tensor, input_grad: bool):
    """All gradients: dW = dy^T x, then those of the factors from its blocks."""
    (m1, n1, _), (groups, rank, bm, bn) = coeff.shape, tiles.shape
    dx = dy @ weight if input_grad else None
    dweight = (dy.t() @ x).view(m1, bm, n1, bn).transpose(1, 2).reshape(groups, -1, bm * bn)
    dcoeff = dweight @ tiles.reshape(groups, rank, bm * bn).transpose(1, 2)
    dtiles = coeff.reshape(groups, -1, rank).transpose(1, 2) @ dweight
    return dx, dcoeff.view(coeff.shape), dtiles.view(tiles.shape)


def stages(sizes: ProductSizes) -> Stages:
    """Count: build W from its factors, if there are any, then one dense product."""
    weights = sizes.m1 * sizes.n1 * sizes.bm * sizes.bn
    return Stages(sizes.rank * weights, sizes.rows * weights, weights)


def backward_macs(stages: Stages, input_grad: bool) -> int:
    """dW is one product of the second stage's size, dx another; W is built again, then dcoeff and dtiles."""
    return stages.second * (1 + input_grad) + 3 * stages.first


DENSE = Plan(
    "dense",
    is_factored=False,
    needs_live=False,
    keeps_blocks=False,
    stages=stages,
    backward_macs=backward_macs,
    first=first,
    second=second,
    backward=backward,
)
