"""Kernels of the products with live blocks; names are those of equation 7 in docs/math.md. Sums have a fixed order.

Sizes in capitals are known when a kernel is compiled: a block is H x W, padded to powers of two BH x BW.
"""

# pyright: reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from kronblocks.ops.backends.triton.products import dot


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
    chunks: tl.constexpr = (W + BW - 1) // BW
    for i in range(tl.load(starts + p) * chunks, tl.load(starts + p + 1) * chunks):  # one loop, so that loads run ahead in it
        k, first = i // chunks, i % chunks * BW
        entry = tl.load(order + k) if TRANSPOSED else k
        block = values + tl.load(slot + entry).to(tl.int64) * (H * W)
        band = x + t[:, None] * x_stride + tl.load(source + entry) * W
        inside = first + w < W
        a = tl.load(band + (first + w)[None, :], mask=(t < rows)[:, None] & inside[None, :], other=0.0)
        w_step, h_step = (H, 1) if TRANSPOSED else (1, W)
        place = block + (first + w)[:, None] * w_step + h[None, :] * h_step
        b = tl.load(place, mask=inside[:, None] & (h < H)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION, SUM)
    if HAS_BIAS:
        total += tl.load(bias + p * H + h, mask=h < H, other=0.0).to(SUM)[None, :]
    place = y + t[:, None] * y_stride + (p * H + h)[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=(t < rows)[:, None] & (h < H)[None, :])


@triton.jit
def grad_values(
    dy, x, out, crow, col, slot, rows, grid_rows, dy_stride, x_stride, split_rows, split_stride,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, slot[k]] = dy[:, p]^T x[:, col[k]] over the rows of a split; a program per split and TERMS entries k of a p.

    Which these are it counts itself, BP block rows at a time; there are a few programs more than entries for them.
    """
    number, split = tl.program_id(0), tl.program_id(1)
    p, k_first, k_end, before = -1, 0, 0, 0
    for row in range(0, grid_rows, BP):
        q = row + tl.arange(0, BP)
        starts = tl.load(crow + q, mask=q < grid_rows, other=0)
        ends = tl.load(crow + q + 1, mask=q < grid_rows, other=0)
        programs = (ends - starts + TERMS - 1) // TERMS
        skipped = number - before - tl.cumsum(programs, 0) + programs  # programs of the same block row before this one
        own = (skipped >= 0) & (skipped < programs)
        p = tl.maximum(p, tl.max(tl.where(own, q, -1), 0))
        k_first += tl.sum(tl.where(own, starts + skipped * TERMS, 0), 0)
        k_end += tl.sum(tl.where(own, ends, 0), 0)
        before += tl.sum(programs, 0)
    if p >= 0:
        column, h, step = tl.arange(0, TERMS * BW), tl.arange(0, BH), tl.arange(0, BT)
        k = k_first + column // BW
        w = column % BW
        exists = (k < k_end) & (w < W)
        place = tl.load(col + k, mask=exists, other=0) * W + w
        if W == BW:  # what the compiler cannot know of loaded numbers: whole blocks are read at once
            place = tl.max_contiguous(tl.multiple_of(place, W), W)
        begin = split.to(tl.int64) * split_rows
        end = tl.minimum(begin + split_rows, rows)
        total = tl.zeros((TERMS * BW, BH), SUM)
        for first in range(begin, end, BT):
            t = first + step
            a = tl.load(x + place[:, None] + t[None, :] * x_stride, mask=exists[:, None] & (t < end)[None, :], other=0.0)
            b = tl.load(dy + t[:, None] * dy_stride + (p * H + h)[None, :], mask=(t < end)[:, None] & (h < H)[None, :], other=0.0)
            total = dot(a, b, total, PRECISION, SUM)
        to = out + split.to(tl.int64) * split_stride + tl.load(slot + k, mask=exists, other=0).to(tl.int64) * (H * W) + w
        tl.store(to[:, None] + h[None, :] * W, total.to(out.dtype.element_ty), mask=exists[:, None] & (h < H)[None, :])
