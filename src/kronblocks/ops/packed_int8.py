"""Packed products with int8 values, for inference: `packed_linear_int8`, and what makes the values.

x is quantised row by row while it is multiplied, sums are exact integers, and one scale for each output brings them back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kronblocks.core.errors import KronblocksError
from kronblocks.ops.backends import native
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.operands import autocast, check_product
from kronblocks.ops.operator import Operator, is_eager, rows_of
from kronblocks.ops.packed import product_flops

LARGEST = 127
"""Quantised numbers are from -127 to 127: -128 would have no opposite."""

MOST_INPUTS = 2**17
"""So many products of two quantised numbers are sure to fit into an int32 when they are added up."""

_ZERO = 2.0**-100  # rows of x without a larger number count as zeros


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x as whole numbers from -127 to 127, and the factor that brings it back (equation 28 in docs/math.md).

    A row without a number of at least 2^-100 becomes zeros, with the factor 0. A row with NaN or infinity gets the factor NaN.

    Args:
        x: (..., n).

    Returns:
        (..., n) float32 whole numbers, (..., 1) float32.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.numel() else x.new_zeros(*x.shape[:-1], 1)
    some, finite = largest >= _ZERO, largest.isfinite()
    by = torch.where(some & finite, torch.full_like(largest, LARGEST) / largest, 0)
    whole = torch.where(some & finite, (x * by).round(), 0)
    return whole, torch.where(some, largest / LARGEST, 0).masked_fill(~finite, torch.nan)


def quantized_blocks(values: Tensor, row: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Live blocks as int8, with one scale for each row of the weight (equation 28 in docs/math.md).

    Args:
        values: (live, bm, bn), finite.
        row: (live,) the block row of each.
        block_rows: m1.

    Returns:
        (live, bm, bn) int8, and (m1*bm,) float32; 0 where all of a row's values are 0.
    """
    values = values.float()
    largest = values.new_zeros(block_rows, values.shape[1])
    if values.numel():
        largest.scatter_reduce_(0, row.long().unsqueeze(1).expand(-1, values.shape[1]), values.abs().amax(2), "amax")
    scales = largest / LARGEST
    own = scales.index_select(0, row.long()).unsqueeze(2)
    whole = torch.where(own > 0, (values / own).round().clamp(-LARGEST, LARGEST), 0)
    return whole.to(torch.int8), scales.flatten()


def _compute(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
) -> Tensor:
    whole, factors = quantized_rows(rows_of(x))
    index = BlockIndex(crow, col, row, slot, ccol, order)
    sums = plain.packed_linear(whole.double(), values.double(), index)  # exact: whole numbers far below 2^53
    y = sums.float() * scales * factors
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def _fake(x, values, scales, bias, crow, *_):
    return x.new_empty(*x.shape[:-1], (crow.shape[0] - 1) * values.shape[1])


def _backward(ctx, dy):
    raise KronblocksError(
        "products with int8 values have no gradient: train the model that they were made from, or call it under torch.no_grad()"
    )


_linear = Operator("packed_linear_int8", _compute, fake=_fake, save=lambda *_: None, backward=_backward, differentiable=1)


def _flops(x, values, scales, *index, **_):
    return product_flops(x, values, *index)


register_flop_formula(torch.ops.kronblocks.packed_linear_int8)(_flops)


def packed_linear_int8(x: Tensor, values: Tensor, scales: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, where W's live blocks are int8 values times their row's scale (equation 28 in docs/math.md).

    Args:
        x: (..., n1*bn), of any floating-point dtype; n1*bn is at most 131,072.
        values: (capacity, bm, bn) int8.
        scales: (m1*bm,) float32.
        index: where the live blocks are.
        bias: (m1*bm,) floating point, or None.

    Returns:
        (..., m1*bm) in the dtype of x. A row of x that holds NaN or infinity gives a row of NaN. There is no gradient.

    Raises:
        KronblocksError: shapes, dtypes or devices do not fit together.
    """
    if isinstance(x, Tensor) and native.checks(x, values, bias, index.crow) and is_eager():
        try:
            return _linear.eager(x, values, scales, bias, *index)
        except RuntimeError:  # what does not fit is told below
            pass
    (x,) = autocast(x)
    (m1, n1), shape = index.grid, values.shape
    if values.dtype is not torch.int8 or len(shape) != 3 or shape[0] != index.slot.shape[0]:
        raise KronblocksError(
            f"values must be int8 (capacity, rows, cols) with the index's capacity, {len(index.slot)}, not {values.dtype} "
            f"{tuple(shape)}"
        )
    check_inputs(n1 * shape[2])
    if scales.dtype is not torch.float32 or scales.shape != (m1 * shape[1],):
        raise KronblocksError(f"scales must be float32 ({m1 * shape[1]},), not {scales.dtype} {tuple(scales.shape)}")
    own = {"values": values, "scales": scales}
    check_product(x, n1, shape[2], bias, m1 * shape[1], own, index.crow, one_dtype=False)
    if not x.is_floating_point():
        raise KronblocksError(f"x must be floating point, not {x.dtype}: it is quantised here")
    return _linear(x, values, scales, bias, *index)


def check_inputs(in_features: int) -> None:
    """Refuse so many inputs that sums might not fit into an int32."""
    if in_features > MOST_INPUTS:
        raise KronblocksError(f"int8 products take at most {MOST_INPUTS:,} inputs, not {in_features:,}: use float values")
