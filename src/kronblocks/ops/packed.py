"""Block-sparse products with the live blocks packed: `packed_linear`, whose `BlockIndex` says where the blocks are.

Three custom operators, each the gradient of the others (equation 7 in docs/math.md): y = x W^T, dx = dy W, and dvalues = the
live blocks of dy^T x. They are opaque to torch.compile and know autograd, fake tensors and autocast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks.ops.backends import native
from kronblocks.ops.index import NO_INDEX_GRADIENTS, BlockIndex
from kronblocks.ops.operands import autocast, check_product
from kronblocks.ops.operator import Operator, is_eager, must_look, rows_of, save_inputs
from kronblocks.ops.pattern import refresh_index


def _packed_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
    look: bool = False,
) -> Tensor:
    if look:
        refresh_index(crow, values)
    index = BlockIndex(crow, col, row, slot, ccol, order)
    y = backends.pick(x).packed_linear(rows_of(x), values, index, bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def _packed_grad_input(
    dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, row: Tensor, slot: Tensor, ccol: Tensor, order: Tensor
) -> Tensor:
    index = BlockIndex(crow, col, row, slot, ccol, order)
    dx = backends.pick(dy).packed_grad_input(rows_of(dy), values, index)
    return dx.view(*dy.shape[:-1], dx.shape[-1])


def _packed_grad_values(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, row: Tensor, slot: Tensor, ccol: Tensor, order: Tensor
) -> Tensor:
    index = BlockIndex(crow, col, row, slot, ccol, order)
    return backends.pick(dy).packed_grad_values(rows_of(dy), rows_of(x), index)


def _fake_linear(x, values, bias, crow, *_):
    return x.new_empty(*x.shape[:-1], (crow.shape[0] - 1) * values.shape[1])


def _fake_grad_input(dy, values, crow, col, row, slot, ccol, order):
    return dy.new_empty(*dy.shape[:-1], (ccol.shape[0] - 1) * values.shape[2])


def _fake_grad_values(dy, x, crow, col, row, slot, ccol, order):
    rows, cols = dy.shape[-1] // (crow.shape[0] - 1), x.shape[-1] // (ccol.shape[0] - 1)
    return dy.new_empty(col.shape[0], rows, cols)


def _save_linear(ctx, inputs, output):
    x, values, _, *index, _ = inputs
    ctx.save_for_backward(x, values, *index)


def _linear_backward(ctx, dy):
    x, values, *index = ctx.saved_tensors
    dx = _grad_input(dy, values, *index) if ctx.needs_input_grad[0] else None
    dvalues = _grad_values(dy, x, *index) if ctx.needs_input_grad[1] else None
    dbias = rows_of(dy).sum(0) if ctx.needs_input_grad[2] else None
    return dx, dvalues, dbias, *NO_INDEX_GRADIENTS, None


def _grad_input_backward(ctx, ddx):
    dy, values, *index = ctx.saved_tensors
    ddy = _linear(ddx, values, None, *index, False) if ctx.needs_input_grad[0] else None
    dvalues = _grad_values(dy, ddx, *index) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, *NO_INDEX_GRADIENTS


def _grad_values_backward(ctx, ddvalues):
    dy, x, *index = ctx.saved_tensors
    ddy = _linear(x, ddvalues, None, *index, False) if ctx.needs_input_grad[0] else None
    dx = _grad_input(dy, ddvalues, *index) if ctx.needs_input_grad[1] else None
    return ddy, dx, *NO_INDEX_GRADIENTS


_linear = Operator(
    "packed_linear", _packed_linear, fake=_fake_linear, save=_save_linear, backward=_linear_backward, differentiable=3
)
_grad_input = Operator(
    "packed_grad_input",
    _packed_grad_input,
    fake=_fake_grad_input,
    save=save_inputs,
    backward=_grad_input_backward,
    differentiable=2,
)
_grad_values = Operator(
    "packed_grad_values",
    _packed_grad_values,
    fake=_fake_grad_values,
    save=save_inputs,
    backward=_grad_values_backward,
    differentiable=2,
)


def product_flops(x: Any, values: Any, *index: Any, **_: Any) -> int:
    """Of y or dx, from the shapes of what is multiplied."""
    return 2 * math.prod(x[:-1]) * values[0] * values[1] * values[2]


def _grad_values_flops(dy: Any, x: Any, *index: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * math.prod(dy[:-1]) * out_shape[0] * out_shape[1] * out_shape[2]


# so that torch's own counter does not report these products as nothing; exact where the index has no padding
register_flop_formula([torch.ops.kronblocks.packed_linear, torch.ops.kronblocks.packed_grad_input])(product_flops)
register_flop_formula(torch.ops.kronblocks.packed_grad_values)(_grad_values_flops)


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, where W has the blocks `values` at the places that `index` lists and is zero elsewhere (equation 7).

    Args:
        x: (..., n1*bn).
        values: (capacity, bm, bn); slots that the index does not list do not count and get a gradient of exactly 0.
        index: where the live blocks are.
        bias: (m1*bm,) or None.

    Returns:
        (..., m1*bm).

    Raises:
        KronblocksError: shapes, dtypes or devices do not fit together.
    """
    if isinstance(x, Tensor) and native.checks(x, values, bias, index.crow) and is_eager():
        try:
            return _linear.eager(x, values, bias, *index, False)
        except RuntimeError:  # what does not fit is told below
            pass
    x, values, bias = autocast(x, values, bias)
    (m1, n1), shape = index.grid, values.shape
    if len(shape) != 3 or shape[0] != index.slot.shape[0]:
        raise KronblocksError(
            f"values must be (capacity, rows, cols) with the index's capacity, {len(index.slot)}, not {tuple(shape)}"
        )
    check_product(x, n1, shape[2], bias, m1 * shape[1], {"values": values}, index.crow)
    return checked_packed_linear(x, values, index, bias)


def checked_packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None) -> Tensor:
    """`packed_linear` of operands that are known to fit together, in the dtype that autocast wants."""
    return _linear(x, values, bias, *index, must_look())
