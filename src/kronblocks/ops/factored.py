"""The products with factors as custom operators: `kron_linear` and its gradient, and the live blocks built from factors.

They are opaque to torch.compile, so that the intermediate is never kept from forward to backward; they know autograd, fake
tensors and PyTorch's operation counter. What callers use is `kronblocks.ops.kron`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kronblocks.ops import backends
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.index import NO_INDEX_GRADIENTS, BlockIndex
from kronblocks.ops.operator import Operator, must_look, rows_of, save_inputs
from kronblocks.ops.pattern import refresh_index, without_dead
from kronblocks.ops.plans import DENSE, PLANS, Stages, dense
from kronblocks.ops.problem import ProductSizes


def _kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: str) -> Tensor:
    backend = backends.pick(x)
    y = backend.kron_linear(rows_of(x), coeff, tiles, bias, _looked_at(live, backend), PLANS[plan]).contiguous()
    return y.view(*x.shape[:-1], y.shape[-1])


def _kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: str, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dcoeff, dtiles; dx is empty, (0,), unless wanted."""
    backend = backends.pick(x)
    live = _looked_at(live, backend)
    dx, dcoeff, dtiles = backend.kron_backward(rows_of(dy), rows_of(x), coeff, tiles, live, PLANS[plan], input_grad)
    dcoeff, dtiles = (t.to(x.dtype).contiguous() for t in (dcoeff, dtiles))  # autocast may be on in backward
    return x.new_empty(0) if dx is None else dx.contiguous().view(x.shape), dcoeff, dtiles


def _looked_at(live: Tensor | None, backend: backends.Backend) -> Tensor | None:
    """The mask, or None where no block is dead and the backend had better not look at it."""
    return live if backend.wants_masks or not without_dead(live) else None


def _fake_forward(x, coeff, tiles, bias, live, plan):
    return x.new_empty(*x.shape[:-1], coeff.shape[0] * tiles.shape[2])


def _fake_backward(dy, x, coeff, tiles, live, plan, input_grad):
    return x.new_empty(x.shape if input_grad else 0), coeff.new_empty(coeff.shape), tiles.new_empty(tiles.shape)


def _setup_forward(ctx, inputs, output):
    x, coeff, tiles, _, live, ctx.plan = inputs
    ctx.save_for_backward(x, coeff, tiles, live)


def _forward_backward(ctx, dy):
    x, coeff, tiles, live = ctx.saved_tensors
    input_grad = ctx.needs_input_grad[0]
    dx, dcoeff, dtiles = kron_backward(dy, x, coeff, tiles, live, ctx.plan, input_grad)
    dbias = rows_of(dy).sum(0) if ctx.needs_input_grad[3] else None
    return dx if input_grad else None, dcoeff, dtiles, dbias, None, None


def _setup_backward(ctx, inputs, output):
    *tensors, ctx.plan, ctx.input_grad = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx, *gradients):
    """Second derivatives, and those of them, by autograd through the plain formula; rarely wanted, never fast."""
    *tensors, live = ctx.saved_tensors
    further = torch.is_grad_enabled()  # derivatives of what comes out are wanted too, so it has to hang on what came in
    with torch.enable_grad():
        dy, x, coeff, tiles = leaves = [
            t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_() for t in tensors
        ]
        alive = coeff if live is None else coeff.masked_fill(~live.unsqueeze(-1), 0)
        y = x @ dense.first(None, alive, tiles).t()
        first = torch.autograd.grad(y, leaves[1:], dy, create_graph=True)
        used = [(d, g) for d, g in zip(first, gradients, strict=True) if g is not None and (g.shape == d.shape)]
        wanted, given = [d for d, _ in used], [g for _, g in used]
        second = torch.autograd.grad(wanted, leaves, given, create_graph=further, allow_unused=True, materialize_grads=True)
    return *second, None, None, None


kron_linear = Operator(
    "kron_linear", _kron_linear, fake=_fake_forward, save=_setup_forward, backward=_forward_backward, differentiable=4
)
kron_backward = Operator(
    "kron_backward", _kron_backward, fake=_fake_backward, save=_setup_backward, backward=_backward_backward, differentiable=4
)


@torch.library.custom_op("kronblocks::dense_linear", mutates_args=())
def dense_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None) -> Tensor:
    """`kron_linear` by the plan "dense": what the C++ kernels call, since torch's own product is the fastest."""
    return torch.nn.functional.linear(x, dense.first(None, plain.live_only(coeff, live), tiles), bias)


@torch.library.custom_op("kronblocks::dense_backward", mutates_args=())
def dense_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`kron_backward` by the plan "dense"."""
    dx, dcoeff, dtiles = plain.kron_backward(rows_of(dy), rows_of(x), coeff, tiles, live, DENSE, input_grad)
    return x.new_empty(0) if dx is None else dx.view(x.shape), dcoeff.contiguous(), dtiles.contiguous()


def _compute_blocks(
    coeff: Tensor,
    tiles: Tensor,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
    look: bool = False,
) -> Tensor:
    if look:
        refresh_index(crow, None)
    index = BlockIndex(crow, col, row, slot, ccol, order)
    return backends.pick(coeff).live_blocks(coeff, tiles, index)


def _compute_blocks_backward(
    dvalues: Tensor,
    coeff: Tensor,
    tiles: Tensor,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor]:
    index = BlockIndex(crow, col, row, slot, ccol, order)
    dcoeff, dtiles = backends.pick(coeff).live_blocks_backward(dvalues, coeff, tiles, index)
    return dcoeff.to(coeff.dtype).contiguous(), dtiles.to(tiles.dtype).contiguous()


def _fake_blocks(coeff, tiles, crow, col, *index):
    return tiles.new_empty(col.shape[0], *tiles.shape[2:])


def _fake_blocks_backward(dvalues, coeff, tiles, *index):
    return coeff.new_empty(coeff.shape), tiles.new_empty(tiles.shape)


def _save_blocks(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _blocks_backward(ctx, dvalues):
    coeff, tiles, *index = ctx.saved_tensors
    return *_live_blocks_backward(dvalues, coeff, tiles, *index), *NO_INDEX_GRADIENTS, None


def _blocks_backward_backward(ctx, ddcoeff, ddtiles):
    """The products are bilinear: values = C T, so both gradients of dcoeff = dV T' and dtiles = C' dV are such products again."""
    dvalues, coeff, tiles, *index = ctx.saved_tensors
    ddvalues = _live_blocks(ddcoeff, tiles, *index, False) + _live_blocks(coeff, ddtiles, *index, False)
    dcoeff = _live_blocks_backward(dvalues, coeff, ddtiles, *index)[0]
    dtiles = _live_blocks_backward(dvalues, ddcoeff, tiles, *index)[1]
    return ddvalues, dcoeff, dtiles, *NO_INDEX_GRADIENTS


_live_blocks = Operator(
    "live_blocks", _compute_blocks, fake=_fake_blocks, save=_save_blocks, backward=_blocks_backward, differentiable=2
)
_live_blocks_backward = Operator(
    "live_blocks_backward",
    _compute_blocks_backward,
    fake=_fake_blocks_backward,
    save=save_inputs,
    backward=_blocks_backward_backward,
    differentiable=3,
)


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W = sum_i A_i kron B_i in the order of the index's entries, (capacity, bm, bn)."""
    return _live_blocks(coeff, tiles, *index, must_look())


def _stages(plan: str, x: Any, coeff: Any, tiles: Any) -> Stages:
    """The multiply-adds of a plan, from the shapes, all blocks live."""
    (m1, n1, rank), (groups, _, bm, bn) = coeff, tiles
    return PLANS[plan].stages(ProductSizes(math.prod(x[:-1]), m1, n1, bm, bn, rank, groups, live=m1 * n1))


@register_flop_formula(torch.ops.kronblocks.kron_linear)
def _forward_flops(x: Any, coeff: Any, tiles: Any, bias: Any, live: Any, plan: str, **_: Any) -> int:
    stages = _stages(plan, x, coeff, tiles)
    return 2 * (stages.first + stages.second)


@register_flop_formula(torch.ops.kronblocks.kron_backward)
def _backward_flops(
    dy: Any, x: Any, coeff: Any, tiles: Any, live: Any, plan: str, input_grad: bool, **_: Any
) -> int:  # fmt: skip
    return 2 * PLANS[plan].backward_macs(_stages(plan, x, coeff, tiles), input_grad)


@register_flop_formula(torch.ops.kronblocks.live_blocks)
def _live_blocks_flops(coeff: Any, tiles: Any, crow: Any, col: Any, *index: Any, **_: Any) -> int:
    return 2 * col[0] * coeff[2] * tiles[2] * tiles[3]


@register_flop_formula(torch.ops.kronblocks.live_blocks_backward)
def _live_blocks_backward_flops(dvalues: Any, coeff: Any, *index: Any, **_: Any) -> int:
    return 4 * dvalues[0] * dvalues[1] * dvalues[2] * coeff[2]
