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
            total = dot(a, b, total, PRECISION, SUM)
        place = out + split.to(tl.int64) * split_stride + tl.load(slot + k).to(tl.int64) * (H * W)
        inside = (h < H)[:, None] & (w < W)[None, :]
        tl.store(place + h[:, None] * W + w[None, :], total.to(out.dtype.element_ty), mask=inside)
