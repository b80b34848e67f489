"""Products with live blocks on any device, in plain PyTorch: W is built, and multiplied as a dense one.

Nothing is read back from the device, no shape depends on what an index holds, and the number of operators is the same for every
grid. So nobody waits, and a CUDA graph can hold all of it. The time is that of a dense product, and of writing W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans.dense import build_blocks


def _padding(index: BlockIndex) -> Tensor:
    """Which entries are no live blocks, (capacity,) bool."""
    ends = index.crow.narrow(0, index.grid[0], 1)
    return torch.arange(len(index.slot), dtype=index.crow.dtype, device=ends.device) >= ends


def _blocks_of(weight: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """A matrix as its blocks, (block_rows, block_columns, bm, bn), a view."""
    height, width = weight.shape[0] // block_rows, weight.shape[1] // block_columns
    return weight.view(block_rows, height, block_columns, width).transpose(1, 2)


def weight(values: Tensor, index: BlockIndex) -> Tensor:
    """W, (m, n), from its live blocks in their slots."""
    (m1, n1), (_, bm, bn) = index.grid, values.shape
    built = values.new_zeros((m1 + 1) * bm, n1 * bn)  # padding goes to a block row below
    row = index.row.masked_fill(_padding(index), m1)
    _blocks_of(built, m1 + 1, n1).index_put_((row.long(), index.col.long()), values.index_select(0, index.slot))
    return built.narrow(0, 0, m1 * bm)


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    return linear(x, weight(values, index), bias).to(x.dtype)  # autocast may be on, here and below


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    return (dy @ weight(values, index)).to(dy.dtype)


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    (m1, n1), capacity = index.grid, len(index.slot)
    blocks = _blocks_of((dy.t() @ x).to(dy.dtype), m1, n1)
    own = torch.ops.aten.index.Tensor(blocks, [index.row.long(), index.col.long()])
    slots = index.slot.masked_fill(_padding(index), capacity)  # padding goes to a slot behind
    return dy.new_zeros(capacity + 1, *own.shape[1:]).index_copy_(0, slots.long(), own).narrow(0, 0, capacity)


def _numbers(index: BlockIndex) -> Tensor:
    """The row-major number of each entry's block, (capacity,); 0 in padding."""
    return index.row * index.grid[1] + index.col


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the index's entries, (capacity, bm, bn); the rest is 0."""
    numbers = _numbers(index)
    if len(tiles) == 1:
        values = coeff.flatten(0, 1).index_select(0, numbers) @ tiles.flatten(2).squeeze(0)
    else:
        values = build_blocks(coeff, tiles).flatten(2).flatten(0, 1).index_select(0, numbers)
    return values.to(tiles.dtype).masked_fill_(_padding(index).view(-1, 1), 0).view(-1, *tiles.shape[2:])


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    (m1, n1, rank), groups = coeff.shape, len(tiles)
    padding = _padding(index)
    numbers = _numbers(index).masked_fill(padding, m1 * n1).long()  # padding goes behind the last block
    flat, banks = dvalues.flatten(1).masked_fill(padding.view(-1, 1), 0), tiles.flatten(2)
    if groups == 1:
        own = coeff.flatten(0, 1).index_select(0, _numbers(index)).masked_fill(padding.view(-1, 1), 0)
        dcoeff = coeff.new_zeros(m1 * n1 + 1, rank).index_copy_(0, numbers, (flat @ banks[0].t()).to(coeff.dtype))
        return dcoeff.narrow(0, 0, m1 * n1).view(coeff.shape), (own.t() @ flat).view(tiles.shape)
    blocks = flat.new_zeros(m1 * n1 + 1, flat.shape[1]).index_copy_(0, numbers, flat).narrow(0, 0, m1 * n1)
    blocks = blocks.view(groups, -1, flat.shape[1])  # of each group's block rows
    dtiles = coeff.reshape(groups, -1, rank).transpose(1, 2) @ blocks
    return (blocks @ banks.transpose(1, 2)).view(coeff.shape), dtiles.view(tiles.shape)
