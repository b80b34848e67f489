"""The GPU kernels that `kronblocks.ops.backends.triton` launches; names are those of equation 7 in docs/math.md.

Sums go over rows and entries in a fixed order and nothing is added atomically, so results are the same from run to run.
Sizes in capitals are known when a kernel is compiled: a block is H x W, padded to powers of two BH x BW.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x, values, bias, y, starts, source, slot, order, rows, columns, x_stride, y_stride,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """y[:, p] = sum over the entries k of p of x[:, source[k]] values[k]^T, or times values[k] if TRANSPOSED.

    A program per p and BT rows; those of the same rows run side by side, so that x is read from memory once.
    """
    program = tl.program_id(0)
    p, t = program % columns, (program // columns).to(tl.int64) * BT + tl.arange(0, BT)
    h, w = tl.arange(0, BH), tl.arange(0, BW)
    total = tl.zeros((BT, BH), SUM)
    for k in range(tl.load(starts + p), tl.load(starts + p + 1)):
        entry = tl.load(order + k) if TRANSPOSED else k
        block = values + tl.load(slot + entry).to(tl.int64) * (H * W)
        band = x + t[:, None] * x_stride + tl.load(source + entry) * W
        for first in range(0, W, BW):
            inside = first + w < W
            a = tl.load(band + (first + w)[None, :], mask=(t < rows)[:, None] & inside[None, :], other=0.0)
            w_step, h_step = (H, 1) if TRANSPOSED else (1, W)
            b = tl.load(
                block + (first + w)[:, None] * w_step + h[None, :] * h_step, mask=inside[:, None] & (h < H)[None, :], other=0.0
            )
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
    if HAS_BIAS:
        total += tl.load(bias + p * H + h, mask=h < H, other=0.0).to(SUM)[None, :]
    place = y + t[:, None] * y_stride + (p * H + h)[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(t < rows)[:, None] & (h < H)[None, :])


@triton.jit
def grad_values(
    dy, x, out, crow, col, row, slot, rows, grid_rows, dy_stride, x_stride, split_rows, split_stride,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, slot[k]] = dy[:, row[k]]^T x[:, col[k]] over the rows of a split; a program per entry and split."""
    k, split = tl.program_id(0), tl.program_id(1)
    if k < tl.load(crow + grid_rows):
        h, w, step = tl.arange(0, BH), tl.arange(0, BW), tl.arange(0, BT)
        left = dy + (tl.load(row + k) * H + h)[:, None]
        right = x + (tl.load(col + k) * W + w)[None, :]
        begin = split.to(tl.int64) * split_rows
        end = tl.minimum(begin + split_rows, rows)
        total = tl.zeros((BH, BW), SUM)
        for first in range(begin, end, BT):
            t = first + step
            a = tl.load(left + t[None, :] * dy_stride, mask=(h < H)[:, None] & (t < end)[None, :], other=0.0)
            b = tl.load(right + t[:, None] * x_stride, mask=(t < end)[:, None] & (w < W)[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
        place = out + split.to(tl.int64) * split_stride + tl.load(slot + k).to(tl.int64) * (H * W)
        inside = (h < H)[:, None] & (w < W)[None, :]
        tl.store(place + h[:, None] * W + w[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def blocks_from_factors(
    coeff, tiles, out, crow, col, row, grid_rows, grid_columns, rows_per_group, capacity,
    RANK: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[k] = sum_i coeff[row[k], col[k], i] tiles[group of row[k], i]; 0 behind the entries.

    A program per BK entries and BA weights.
    """
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    live = k < tl.load(crow + grid_rows)
    p, q = tl.load(row + k, mask=live, other=0), tl.load(col + k, mask=live, other=0)
    own = coeff + (p.to(tl.int64) * grid_columns + q) * RANK
    bank = tiles + (p // rows_per_group).to(tl.int64) * (RANK * AREA)
    total = tl.zeros((BK, BA), SUM)
    for i in range(RANK):
        c = tl.load(own + i, mask=live, other=0.0).to(SUM)
        tile = tl.load(bank[:, None] + i * AREA + a[None, :], mask=live[:, None] & (a < AREA)[None, :], other=0.0).to(SUM)
        total += c[:, None] * tile
    place = out + k.to(tl.int64)[:, None] * AREA + a[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(k < capacity)[:, None] & (a < AREA)[None, :])


@triton.jit
def coeff_gradient(
    dvalues, tiles, out, crow, col, row, grid_rows, grid_columns, rows_per_group,
    RANK: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[row[k], col[k], i] = <dvalues[k], tiles[group, i]>; a program per BK entries and term."""
    k, i = tl.program_id(0) * BK + tl.arange(0, BK), tl.program_id(1)
    live = k < tl.load(crow + grid_rows)
    p, q = tl.load(row + k, mask=live, other=0), tl.load(col + k, mask=live, other=0)
    bank = tiles + (p // rows_per_group).to(tl.int64) * (RANK * AREA) + i * AREA
    total = tl.zeros((BK,), SUM)
    for first in range(0, AREA, BA):
        a = first + tl.arange(0, BA)
        inside = live[:, None] & (a < AREA)[None, :]
        d = tl.load(dvalues + k.to(tl.int64)[:, None] * AREA + a[None, :], mask=inside, other=0.0).to(SUM)
        total += tl.sum(d * tl.load(bank[:, None] + a[None, :], mask=inside, other=0.0).to(SUM), 1)
    place = out + (p.to(tl.int64) * grid_columns + q) * RANK + i
    tl.store(place, total.to(out.dtype.element_ty), mask=live)


@triton.jit
def tiles_gradient(
    dvalues, coeff, out, crow, col, row, grid_columns, rows_per_group, splits,
    RANK: tl.constexpr, BR: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, g, i] = sum of coeff[row[k], col[k], i] dvalues[k] over a split of the entries of group g.

    A program per group, split and BA weights; the entries of a group stand together, since entries go row by row.
    """
    g, split, a = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BA + tl.arange(0, BA)
    i, step = tl.arange(0, BR), tl.arange(0, BK)
    begin, end = tl.load(crow + g * rows_per_group), tl.load(crow + (g + 1) * rows_per_group)
    share = (end - begin + splits - 1) // splits
    begin += split * share
    end = tl.minimum(begin + share, end)
    total = tl.zeros((BR, BA), SUM)
    for first in range(begin, end, BK):
        k = first + step
        live = k < end
        p, q = tl.load(row + k, mask=live, other=0), tl.load(col + k, mask=live, other=0)
        place = (p.to(tl.int64) * grid_columns + q) * RANK
        c = tl.load(coeff + place[None, :] + i[:, None], mask=(i < RANK)[:, None] & live[None, :], other=0.0)
        inside = live[:, None] & (a < AREA)[None, :]
        d = tl.load(dvalues + k.to(tl.int64)[:, None] * AREA + a[None, :], mask=inside, other=0.0)
        total = tl.dot(c, d, total, input_precision=PRECISION, out_dtype=SUM)
    place = ((split * tl.num_programs(0) + g) * RANK + i).to(tl.int64)[:, None] * AREA + a[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(i < RANK)[:, None] & (a < AREA)[None, :])


@triton.jit
def scatter(
    values, weight, crow, col, row, slot, grid_rows, width,
    H: tl.constexpr, W: tl.constexpr, AREA: tl.constexpr, BK: tl.constexpr, BA: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """weight[row[k], col[k]] = values[slot[k]], or the other way round if GATHER; a program per BK entries and BA weights."""
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    a = tl.program_id(1) * BA + tl.arange(0, BA)
    live = k < tl.load(crow + grid_rows)
    p, q = tl.load(row + k, mask=live, other=0), tl.load(col + k, mask=live, other=0)
    s = tl.load(slot + k, mask=live, other=0).to(tl.int64)
    packed = values + s[:, None] * AREA + a[None, :]
    whole = weight + (p.to(tl.int64) * H)[:, None] * width + (a // W)[None, :] * width + (q * W)[:, None] + (a % W)[None, :]
    inside = live[:, None] & (a < AREA)[None, :]
    if GATHER:
        tl.store(packed, tl.load(whole, mask=inside), mask=inside)
    else:
        tl.store(whole, tl.load(packed, mask=inside), mask=inside)
