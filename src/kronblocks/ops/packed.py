"""Block-sparse products with the live blocks packed: `BlockIndex` says where they are, `packed_linear` multiplies.

Three custom operators, each the gradient of the others (equation 7 in docs/math.md): y = x W^T, dx = dy W, and dvalues = the
live blocks of dy^T x. They are opaque to torch.compile and know autograd, fake tensors and autocast.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kronblocks.errors import KronblocksError
from kronblocks.ops import backends


class BlockIndex(NamedTuple):
    """Where the live blocks of an (m1, n1) grid are; all tensors int32.

    Entries `0 .. crow[-1]-1` are the live blocks in row-major order; what stands behind them is padding, so that an index can
    shrink while its shapes stay. `order` lists the entries column by column: the transpose, made once.
    """

    crow: Tensor  # (m1 + 1,)  first entry of each block row
    col: Tensor  # (capacity,) block column of an entry
    row: Tensor  # (capacity,) block row of an entry
    slot: Tensor  # (capacity,) which of `values` an entry is
    ccol: Tensor  # (n1 + 1,)  first place in `order` of each block column
    order: Tensor  # (capacity,) entries sorted by block column

    @classmethod
    def from_mask(cls, mask: Tensor, position: Tensor | None = None) -> BlockIndex:
        """Index of the live blocks of a mask.

        Args:
            mask: (m1, n1) bool, True = live.
            position: (capacity,) row-major block number of each slot of `values`; without it the slots are the live blocks in
                row-major order and the capacity is their number.
        """
        m1, n1 = mask.shape
        live = mask.flatten()
        if position is None:
            position = live.nonzero().squeeze(1)
            slot = torch.arange(len(position), device=mask.device)
        else:
            slot = live[position].nonzero().squeeze(1)
            if len(slot) < int(live.sum()):
                raise KronblocksError("a live block of the mask has no slot: position must name every live block")
            slot = slot[position[slot].argsort()]
        capacity, entry = len(position), position[slot].long()
        row, col = entry // n1, entry % n1
        order = (col * m1 + row).argsort()

        def padded(index: Tensor) -> Tensor:
            return torch.nn.functional.pad(index, (0, capacity - len(index))).to(torch.int32)

        def starts(index: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(torch.bincount(index, minlength=size).cumsum(0), (1, 0)).to(torch.int32)

        return cls(starts(row, m1), padded(col), padded(row), padded(slot), starts(col, n1), padded(order))

    @property
    def grid(self) -> tuple[int, int]:
        """(m1, n1)."""
        return self.crow.shape[0] - 1, self.ccol.shape[0] - 1


@torch.library.custom_op("kronblocks::packed_linear", mutates_args=())
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
) -> Tensor:
    return backends.pick(x).packed_linear(x, values, BlockIndex(crow, col, row, slot, ccol, order), bias)


@torch.library.custom_op("kronblocks::packed_grad_input", mutates_args=())
def _packed_grad_input(
    dy: Tensor, values: Tensor, crow: Tensor, col: Tensor, row: Tensor, slot: Tensor, ccol: Tensor, order: Tensor
) -> Tensor:
    return backends.pick(dy).packed_grad_input(dy, values, BlockIndex(crow, col, row, slot, ccol, order))


@torch.library.custom_op("kronblocks::packed_grad_values", mutates_args=())
def _packed_grad_values(
    dy: Tensor, x: Tensor, crow: Tensor, col: Tensor, row: Tensor, slot: Tensor, ccol: Tensor, order: Tensor
) -> Tensor:
    return backends.pick(dy).packed_grad_values(dy, x, BlockIndex(crow, col, row, slot, ccol, order))


@_packed_linear.register_fake
def _(x, values, bias, crow, *index):
    return x.new_empty(x.shape[0], (crow.shape[0] - 1) * values.shape[1])


@_packed_grad_input.register_fake
def _(dy, values, crow, col, row, slot, ccol, order):
    return dy.new_empty(dy.shape[0], (ccol.shape[0] - 1) * values.shape[2])


@_packed_grad_values.register_fake
def _(dy, x, crow, col, row, slot, ccol, order):
    rows, cols = dy.shape[1] // (crow.shape[0] - 1), x.shape[1] // (ccol.shape[0] - 1)
    return dy.new_empty(col.shape[0], rows, cols)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


NO_INDEX_GRADIENTS = (None,) * len(BlockIndex._fields)


def _save_linear(ctx, inputs, output):
    x, values, _, *index = inputs
    ctx.save_for_backward(x, values, *index)


def _linear_backward(ctx, dy):
    x, values, *index = ctx.saved_tensors
    dx = _packed_grad_input(dy, values, *index) if ctx.needs_input_grad[0] else None
    dvalues = _packed_grad_values(dy, x, *index) if ctx.needs_input_grad[1] else None
    dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dvalues, dbias, *NO_INDEX_GRADIENTS


def _grad_input_backward(ctx, ddx):
    dy, values, *index = ctx.saved_tensors
    ddy = _packed_linear(ddx, values, None, *index) if ctx.needs_input_grad[0] else None
    dvalues = _packed_grad_values(dy, ddx, *index) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, *NO_INDEX_GRADIENTS


def _grad_values_backward(ctx, ddvalues):
    dy, x, *index = ctx.saved_tensors
    ddy = _packed_linear(x, ddvalues, None, *index) if ctx.needs_input_grad[0] else None
    dx = _packed_grad_input(dy, ddvalues, *index) if ctx.needs_input_grad[1] else None
    return ddy, dx, *NO_INDEX_GRADIENTS


def _product_flops(x: Any, values: Any, *index: Any, **_: Any) -> int:
    return 2 * x[0] * values[0] * values[1] * values[2]


def _grad_values_flops(dy: Any, x: Any, *index: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * dy[0] * out_shape[0] * out_shape[1] * out_shape[2]


# so that torch's own counter does not report these products as nothing; exact where the index has no padding
register_flop_formula([torch.ops.kronblocks.packed_linear, torch.ops.kronblocks.packed_grad_input])(_product_flops)
register_flop_formula(torch.ops.kronblocks.packed_grad_values)(_grad_values_flops)

_packed_linear.register_autograd(_linear_backward, setup_context=_save_linear)
_packed_grad_input.register_autograd(_grad_input_backward, setup_context=_save)
_packed_grad_values.register_autograd(_grad_values_backward, setup_context=_save)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast asks for on their device, unchanged where it is off."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def check_product(
    x: Tensor, columns: int, width: int, bias: Tensor | None, out_features: int, weights: dict[str, Tensor]
) -> None:
    """Refuse an x or a bias that does not fit the weights, in shape or dtype."""
    features = x.shape[-1] if x.dim() else 0
    if features != columns * width:
        raise KronblocksError(f"x has {features} features, but {columns} block columns of {width} need {columns * width}")
    if bias is not None and bias.shape != (out_features,):
        raise KronblocksError(f"bias must be ({out_features},), not {tuple(bias.shape)}")
    others = weights if bias is None else {**weights, "bias": bias}
    if any(tensor.dtype != x.dtype for tensor in others.values()):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in others.items())
        raise KronblocksError(
            f"x is {x.dtype}, but {found}: convert the model or the input with .to(dtype), or use torch.autocast"
        )


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
        KronblocksError: shapes or dtypes do not fit together.
    """
    x, values, bias = autocast(x, values, bias)
    m1, n1 = index.grid
    if values.dim() != 3 or values.shape[0] != len(index.slot):
        raise KronblocksError(
            f"values must be (capacity, rows, cols) with the index's capacity, {len(index.slot)}, not {tuple(values.shape)}"
        )
    check_product(x, n1, values.shape[2], bias, m1 * values.shape[1], {"values": values})
    y = _packed_linear(x.reshape(-1, x.shape[-1]), values, bias, *index)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], m1 * values.shape[1])
