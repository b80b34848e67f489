"""Kernels that build blocks from factors, and their gradients. Blocks are in slots, or at their places in W.

Entry k is the block (p, q). In a list, entries come from a `BlockIndex`, and block k is the k-th of `values`. For the WHOLE grid,
k counts all blocks row by row, `values` is W, and `live` (or nothing) says which blocks count. A block is H x W, AREA weights.
"""

# pyright: reportArgumentType=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from kronblocks.ops.backends.triton.products import dot


@triton.jit
def _entries(k, crow, col, row, live, grid_rows, grid_columns, WHOLE: tl.constexpr, MASKED: tl.constexpr):
    """Whether the entries exist, where in the grid they are, and whether they count."""
    if WHOLE:
        exists, p, q = k < grid_rows * grid_columns, k // grid_columns, k % grid_columns
        counts = exists
        if MASKED:
            counts = tl.load(live + k, mask=exists, other=0) != 0
    else:
        exists = k < tl.load(crow + grid_rows)
        p, q = tl.load(row + k, mask=exists, other=0), tl.load(col + k, mask=exists, other=0)
        counts = exists
    return exists, p, q, counts


@triton.jit
def _places(k, a, p, q, grid_columns, W: tl.constexpr, AREA: tl.constexpr, WHOLE: tl.constexpr):
    """Where the weights a of the blocks stand."""
    if WHOLE:
        first = p.to(tl.int64) * AREA * grid_columns + q * W
        return first[:, None] + ((a // W) * W * grid_columns + a % W)[None, :]
    return k.to(tl.int64)[:, None] * AREA + a[None, :]


@triton.jit
def blocks_from_factors(
    coeff, tiles, values, crow, col, row, live, grid_rows, grid_columns, rows_per_group, capacity,
    RANK: tl.constexpr, W: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """block k = sum_i coeff[p, q, i] tiles[group of p, i]; 0 if dead, and behind the entries. A program per BK x BA weights."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    _, p, q, counts = _entries(k, crow, col, row, live, grid_rows, grid_columns, WHOLE, MASKED)
    own = coeff + (p.to(tl.int64) * grid_columns + q) * RANK
    bank = tiles + (p // rows_per_group).to(tl.int64) * (RANK * AREA)
    total = tl.zeros((BK, BA), SUM)
    for i in range(RANK):
        c = tl.load(own + i, mask=counts, other=0.0).to(SUM)
        tile = tl.load(bank[:, None] + i * AREA + a[None, :], mask=counts[:, None] & (a < AREA)[None, :], other=0.0).to(SUM)
        total += c[:, None] * tile
    place = values + _places(k, a, p, q, grid_columns, W, AREA, WHOLE)
    tl.store(place, total.to(values.dtype.element_ty), mask=(k < capacity)[:, None] & (a < AREA)[None, :])


@triton.jit
def coeff_gradient(
    dvalues, tiles, out, crow, col, row, live, grid_rows, grid_columns, rows_per_group,
    RANK: tl.constexpr, W: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[p, q, i] = <gradient of block k, tiles[group, i]>, 0 if it is dead; a program per BK entries and term."""
    k, i = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1)
    exists, p, q, counts = _entries(k, crow, col, row, live, grid_rows, grid_columns, WHOLE, MASKED)
    bank = tiles + (p // rows_per_group).to(tl.int64) * (RANK * AREA) + i * AREA
    total = tl.zeros((BK,), SUM)
    for first in range(0, AREA, BA):
        a = first + tl.arange(0, BA)
        inside = counts[:, None] & (a < AREA)[None, :]
        d = tl.load(dvalues + _places(k, a, p, q, grid_columns, W, AREA, WHOLE), mask=inside, other=0.0).to(SUM)
        total += tl.sum(d * tl.load(bank[:, None] + a[None, :], mask=inside, other=0.0).to(SUM), 1)
    place = out + (p.to(tl.int64) * grid_columns + q) * RANK + i
    tl.store(place, total.to(out.dtype.element_ty), mask=exists)


@triton.jit
def tiles_gradient(
    dvalues, coeff, out, crow, col, row, live, grid_rows, grid_columns, rows_per_group, splits,
    RANK: tl.constexpr, BR: tl.constexpr, W: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, g, i] = sum of coeff[p, q, i] times the gradient of block k over a split of the entries of group g.

    A program per group, split and BA weights; the entries of a group stand together, since entries go row by row.
    """
    g, split, a = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BA + tl.arange(0, BA)
    i, step = tl.arange(0, BR), tl.arange(0, BK)
    if WHOLE:
        begin, end = g * rows_per_group * grid_columns, (g + 1) * rows_per_group * grid_columns
    else:
        begin, end = tl.load(crow + g * rows_per_group), tl.load(crow + (g + 1) * rows_per_group)
    share = (end - begin + splits - 1) // splits
    begin += split * share
    end = tl.minimum(begin + share, end)
    total = tl.zeros((BR, BA), SUM)
    for first in range(begin, end, BK):
        k = first + step
        _, p, q, counts = _entries(k, crow, col, row, live, grid_rows, grid_columns, WHOLE, MASKED)
        counts = counts & (k < end)
        place = (p.to(tl.int64) * grid_columns + q) * RANK
        c = tl.load(coeff + place[None, :] + i[:, None], mask=(i < RANK)[:, None] & counts[None, :], other=0.0)
        inside = counts[:, None] & (a < AREA)[None, :]
        d = tl.load(dvalues + _places(k, a, p, q, grid_columns, W, AREA, WHOLE), mask=inside, other=0.0)
        total = dot(c, d, total, PRECISION, SUM)
    place = ((split * tl.num_programs(0) + g) * RANK + i).to(tl.int64)[:, None] * AREA + a[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(i < RANK)[:, None] & (a < AREA)[None, :])


@triton.jit
def scatter(
    values, weight, crow, col, row, slot, grid_rows, grid_columns,
    W: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """weight[p, q] = values[slot[k]], or the other way round if GATHER; a program per BK entries and BA weights."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    exists, p, q, _ = _entries(k, crow, col, row, crow, grid_rows, grid_columns, WHOLE=False, MASKED=False)
    s = tl.load(slot + k, mask=exists, other=0)
    packed = values + _places(s, a, p, q, grid_columns, W, AREA, WHOLE=False)
    whole = weight + _places(s, a, p, q, grid_columns, W, AREA, WHOLE=True)
    inside = exists[:, None] & (a < AREA)[None, :]
    if GATHER:
        tl.store(packed, tl.load(whole, mask=inside), mask=inside)
    else:
        tl.store(whole, tl.load(packed, mask=inside), mask=inside)
