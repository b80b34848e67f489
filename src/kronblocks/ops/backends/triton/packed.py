"""Products with live blocks. Blocks from 16 to 128 go through tensor cores; for others W is built, and cuBLAS multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.backends.triton.launch import PROGRAMS, arithmetic, cells, launch, padded, sum_dtype
from kronblocks.ops.backends.triton.weights import gather, scatter

if TYPE_CHECKING:
    from kronblocks.ops.packed import BlockIndex

_SMALLEST, _LARGEST = 16, 128  # sides of a block that tensor cores take whole
_SPLIT_ROWS = 1024  # of a sum over rows, at least, for one program


def _fits(height: int, width: int) -> bool:
    return min(height, width) >= _SMALLEST and max(height, width) <= _LARGEST


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    if not _fits(*values.shape[1:]):
        return linear(x, scatter(values, index), bias)
    return _product(x, values, bias, index, transposed=False)


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    if not _fits(*values.shape[1:]):
        return dy @ scatter(values, index)
    return _product(dy, values, None, index, transposed=True)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, *, transposed: bool) -> Tensor:
    x, values = x.contiguous(), values.contiguous()
    _, bm, bn = values.shape
    height, width, columns = (bn, bm, index.grid[1]) if transposed else (bm, bn, index.grid[0])
    rows, step = x.shape[0], 64 if x.shape[0] > 1024 else 32
    chunk = min(32 if x.element_size() > 2 else 64, padded(width, 16))  # as much as fits the shared memory of any GPU, three deep
    y = x.new_empty(rows, columns * height)
    starts, source = (index.ccol, index.row) if transposed else (index.crow, index.col)
    launch(
        "product", (columns * cells(rows, step),),
        x, values, bias, y, starts, source, index.slot, index.order, rows, columns, x.shape[1], y.shape[1],
        H=height, W=width, BH=padded(height), BW=chunk, BT=step,
        TRANSPOSED=transposed, HAS_BIAS=bias is not None, num_warps=4, **arithmetic(x.dtype),
    )  # fmt: skip
    return y


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    (m1, n1), rows, capacity = index.grid, x.shape[0], len(index.slot)
    height, width = dy.shape[1] // m1, x.shape[1] // n1
    if not _fits(height, width):
        return gather(dy.t() @ x, index, height, width)
    dy, x = dy.contiguous(), x.contiguous()
    splits = max(1, min(cells(PROGRAMS, max(1, capacity)), cells(rows, _SPLIT_ROWS)))
    shape = (capacity, height, width)
    out = dy.new_zeros(shape) if splits == 1 else dy.new_zeros(splits, *shape, dtype=sum_dtype(dy))
    share = cells(cells(rows, splits), 32) * 32
    launch(
        "grad_values", (capacity, splits if rows else 0),
        dy, x, out, index.crow, index.col, index.row, index.slot, rows, m1, dy.shape[1], x.shape[1], share,
        capacity * height * width, H=height, W=width, BH=padded(height), BW=padded(width), BT=32,
        num_warps=4 if height * width <= 4096 else 8, **arithmetic(x.dtype),
    )  # fmt: skip
    return out if splits == 1 else out.sum(0).to(dy.dtype)
