"""Products with live blocks on a CPU, in plain PyTorch: one matrix product per block row, the multiply-adds of the live blocks.

The number of products grows with the grid, and where block rows begin is read from the index: both cost nothing on a CPU only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kronblocks.ops.index import BlockIndex


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


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    sorted_values = values.index_select(0, index.slot)
    y = _rows_first(_product(_columns_of(x, index.grid[1]), sorted_values, index.crow, index.col))
    return y if bias is None else y + bias


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


def _groups(index: BlockIndex, groups: int) -> Iterator[tuple[int, slice]]:
    """The entries of each group of block rows, which are adjacent, since entries are in row-major order."""
    ends = index.crow[:: index.grid[0] // groups].tolist()
    return enumerate(slice(*pair) for pair in itertools.pairwise(ends))


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the index's entries, (capacity, bm, bn); the rest is 0."""
    own = coeff[index.row, index.col]
    values = tiles.new_zeros(len(own), *tiles.shape[2:])
    for g, entries in _groups(index, len(tiles)):
        torch.mm(own[entries], tiles[g].flatten(1), out=values[entries].flatten(1))
    return values


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    own, flat = coeff[index.row, index.col], dvalues.flatten(1)
    dcoeff, dtiles = torch.zeros_like(coeff), torch.empty_like(tiles)
    for g, entries in _groups(index, len(tiles)):
        dtiles[g] = (own[entries].t() @ flat[entries]).view(tiles.shape[1:])
        dcoeff[index.row[entries], index.col[entries]] = (flat[entries] @ tiles[g].flatten(1).t()).to(coeff.dtype)
    return dcoeff, dtiles
