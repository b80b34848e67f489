"""The backend that is always there: plain PyTorch on any device and dtype.

The factored plans are einsums (see `ops/plans`), which cannot skip single dead blocks; the packed products below loop over
block rows, one matrix product each, and do exactly the multiply-adds of the live blocks.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kronblocks.ops.packed import BlockIndex


def _columns_of(x: Tensor, count: int) -> Tensor:
    """(rows, count*width) -> (count, width, rows), contiguous, so that a block column is one slice."""
    return x.t().contiguous().view(count, x.shape[1] // count, x.shape[0])


def _product(x: Tensor, values: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """y[p] = sum over the entries k of row p of values[k] @ x[source[k]]; x (count, width, rows) -> (len, height, rows)."""
    ends, height, width = starts.tolist(), values.shape[1], values.shape[2]
    y = x.new_empty(len(ends) - 1, height, x.shape[2])
    for p, (start, end) in enumerate(itertools.pairwise(ends)):
        if start == end:
            y[p] = 0
            continue
        band = values[start:end].transpose(0, 1).reshape(height, (end - start) * width)
        inputs = x.index_select(0, source[start:end]).view((end - start) * width, x.shape[2])
        torch.mm(band, inputs, out=y[p])
    return y


def _rows_first(y: Tensor) -> Tensor:
    """(count, height, rows) -> (rows, count*height), contiguous."""
    return y.reshape(y.shape[0] * y.shape[1], y.shape[2]).t().contiguous()


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """y = x W^T; x (rows, n) -> (rows, m)."""
    sorted_values = values.index_select(0, index.slot)
    return _rows_first(_product(_columns_of(x, index.grid[1]), sorted_values, index.crow, index.col))


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W: the same product with the transposed index; dy (rows, m) -> (rows, n)."""
    sorted_values = values.index_select(0, index.slot.index_select(0, index.order)).transpose(1, 2)
    source = index.row.index_select(0, index.order)
    return _rows_first(_product(_columns_of(dy, index.grid[0]), sorted_values, index.ccol, source))


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    dy_bands, x_bands = _columns_of(dy, index.grid[0]), _columns_of(x, index.grid[1])
    height, width = dy_bands.shape[1], x_bands.shape[1]
    dvalues = dy.new_zeros(len(index.slot), height, width)
    ends = index.crow.tolist()
    for p, (start, end) in enumerate(itertools.pairwise(ends)):
        if start == end:
            continue
        inputs = x_bands.index_select(0, index.col[start:end]).view((end - start) * width, x.shape[0])
        band = (dy_bands[p] @ inputs.t()).view(height, end - start, width).transpose(0, 1)
        dvalues.index_copy_(0, index.slot[start:end].long(), band.to(dvalues.dtype))  # autocast may be on in backward
    return dvalues
