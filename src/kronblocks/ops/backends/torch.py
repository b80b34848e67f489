"""The backend that always works: plain PyTorch on any device and dtype.

The factored plans are einsums (see `ops/plans`), which cannot skip single dead blocks. The packed products below make one matrix
product per block row, with exactly the multiply-adds of the live blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from kronblocks.ops.backends.protocol import CALL_SECONDS
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import DENSE, PACKED, Plan
from kronblocks.ops.problem import Problem

name = "torch"
wants_masks = False

_EINSUM_EFFICIENCY = 0.6  # measured on 2 CPU cores, as the next one
_PACKED_EFFICIENCY, _MOST_PACKED = 0.006, 0.8  # per side of a block: one thin product per block row, 0.03 at 4x4, 0.1 at 16x16
_PRODUCT_SECONDS = 2e-5  # to launch one of those thin products


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """Whether it serves: always."""
    return True


def build() -> str:
    """ "": keys of timings have torch's version anyway."""
    return ""


def efficiency(problem: Problem, plan: Plan) -> float:
    """Rate of a plan as a share of a dense product's, measured on 2 CPU cores."""
    if plan is PACKED:
        return min(_MOST_PACKED, _PACKED_EFFICIENCY * min(problem.grid.block))
    return _EINSUM_EFFICIENCY


def keeps_on_chip(problem: Problem, plan: Plan) -> bool:
    """Whether intermediates stay on chip: never, since an einsum's result is a tensor."""
    return False


def call_seconds(problem: Problem, plan: Plan) -> float:
    """The packed plan launches about a product per block row and column, in training twice as many."""
    if plan is DENSE:
        return 0.0
    products = (2 if problem.training else 1) * sum(problem.grid.shape) if plan is PACKED else 0
    return CALL_SECONDS + products * _PRODUCT_SECONDS


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


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """y = x W^T + bias by a factored plan; x (rows, n) -> (rows, m)."""
    coeff = live_only(coeff, live)
    y = plan.second(x, coeff, tiles, plan.first(x, coeff, tiles))
    return y if bias is None else y + bias


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles; the intermediate is computed again."""
    coeff = live_only(coeff, live)
    intermediate = plan.first(x, coeff, tiles)
    dx, dcoeff, dtiles = plan.backward(dy.contiguous(), x, coeff, tiles, intermediate, input_grad)
    return dx, live_only(dcoeff, live), dtiles


def live_only(coeff: Tensor, live: Tensor | None) -> Tensor:
    """The coefficients, 0 for dead blocks."""
    return coeff if live is None else coeff.masked_fill(~live.unsqueeze(-1), 0)


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
