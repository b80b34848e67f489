"""Kernels of the products with live blocks; names are those of equation 7 in docs/math.md. Sums have a fixed order.

Sizes in capitals are known when a kernel is compiled: a block is H x W, padded to powers of two BH x BW.
"""

# pyright: reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from kronblocks.ops.backends.triton.products import dot


@triton.jit
def _piece(starts, number, columns, TAKE: tl.constexpr, LEAST: tl.constexpr, BP: tl.constexpr):
    """Map a program's number to its p and range of entries: up to TAKE entries each, and at least LEAST programs for each p.

    The p, or -1 if there are fewer programs; the first of the entries and their end; and how many programs the p has. It goes
    through BP of the p at a time.
    """
    p, k_first, k_end, pieces, before = -1, 0, 0, 0, 0
    for first in range(0, columns, BP):
        q = first + tl.arange(0, BP)
        begins = tl.load(starts + q, mask=q < columns, other=0)
        ends = tl.load(starts + q + 1, mask=q < columns, other=0)
        programs = tl.where(q < columns, tl.maximum((ends - begins + TAKE - 1) // TAKE, LEAST), 0)
        numbers = before + tl.cumsum(programs, 0) - programs
        own = (numbers <= number) & (number < numbers + programs)
        p = tl.maximum(p, tl.max(tl.where(own, q, -1), 0))
        k_first += tl.sum(tl.where(own, begins + (number - numbers) * TAKE, 0), 0)
        k_end += tl.sum(tl.where(own, tl.minimum(begins + (number - numbers + 1) * TAKE, ends), 0), 0)
        pieces += tl.sum(tl.where(own, programs, 0), 0)
        before += tl.sum(programs, 0)
    return p, k_first, k_end, pieces


@triton.jit
def product(
    x, values, bias, y, parts, starts, source, slot, order, rows, columns, places, x_stride, y_stride,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TAKE: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """y[:, p] = sum over the entries k of p of x[:, source[k]] values[k]^T, or times values[k] if TRANSPOSED.

    A program per p and BT rows; those of the same rows run side by side, so that x is read from memory once. If TAKE, a p with
    more entries has several, whose sums go to `parts` (places, rows, BH) for `join`; there are `places` programs side by side.
    """
    place = tl.program_id(0) % places
    t = (tl.program_id(0) // places).to(tl.int64) * BT + tl.arange(0, BT)
    if TAKE:
        p, k_first, k_end, pieces = _piece(starts, place, columns, TAKE, 1, BP)
    else:
        p, k_first, k_end, pieces = place, tl.load(starts + place), tl.load(starts + place + 1), 1
    h, w = tl.arange(0, BH), tl.arange(0, BW)
    total = tl.zeros((BT, BH), SUM)
    chunks: tl.constexpr = (W + BW - 1) // BW
    for i in range(k_first * chunks, k_end * chunks):  # one loop, so that loads run ahead in it
        k, first = i // chunks, i % chunks * BW
        entry = tl.load(order + k) if TRANSPOSED else k
        block = values + tl.load(slot + entry).to(tl.int64) * (H * W)
        band = x + t[:, None] * x_stride + tl.load(source + entry) * W
        inside = first + w < W
        a = tl.load(band + (first + w)[None, :], mask=(t < rows)[:, None] & inside[None, :], other=0.0)
        w_step, h_step = (H, 1) if TRANSPOSED else (1, W)
        b_place = block + (first + w)[:, None] * w_step + h[None, :] * h_step
        b = tl.load(b_place, mask=inside[:, None] & (h < H)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION, SUM)
    if TAKE:
        to = parts + (place * rows + t)[:, None] * BH + h[None, :]
        tl.store(to, total, mask=((t < rows) & (pieces > 1))[:, None])
    _finish(y, total, bias, t, (t < rows) & (p >= 0) & (pieces == 1), p, h, y_stride, H, HAS_BIAS)


@triton.jit
def _finish(y, total, bias, t, exists, p, h, y_stride, H: tl.constexpr, HAS_BIAS: tl.constexpr):
    """y[t, p] = total + bias[p]."""
    if HAS_BIAS:
        total += tl.load(bias + p * H + h, mask=(h < H) & (p >= 0), other=0.0).to(total.dtype)[None, :]
    place = y + t[:, None] * y_stride + (p * H + h)[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=exists[:, None] & (h < H)[None, :])


@triton.jit
def join(
    parts, bias, y, starts, rows, y_stride,
    H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TAKE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[:, p] of each p whose entries several programs of `product` have taken, the sum of theirs in their order."""
    p, t = tl.program_id(0), tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    pieces = (tl.load(starts + p + 1) - tl.load(starts + p) + TAKE - 1) // TAKE
    if pieces > 1:
        number = 0
        for first in range(0, p, BP):
            q = first + tl.arange(0, BP)
            entries = tl.load(starts + q + 1, mask=q < p, other=0) - tl.load(starts + q, mask=q < p, other=0)
            number += tl.sum(tl.where(q < p, tl.maximum((entries + TAKE - 1) // TAKE, 1), 0), 0)
        h = tl.arange(0, BH)
        total = tl.zeros((BT, BH), parts.dtype.element_ty)
        for piece in range(number, number + pieces):
            own = parts + (piece * rows + t)[:, None] * BH + h[None, :]
            total += tl.load(own, mask=(t < rows)[:, None], other=0.0)
        _finish(y, total, bias, t, t < rows, p, h, y_stride, H, HAS_BIAS)


@triton.jit
def grad_values(
    dy, x, out, crow, col, slot, rows, grid_rows, dy_stride, x_stride, split_rows, split_stride,
    H: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, slot[k]] = dy[:, p]^T x[:, col[k]] over the rows of a split; a program per split and TERMS entries k of a p.

    There are a few programs more than entries for them.
    """
    number, split = tl.program_id(0), tl.program_id(1)
    p, k_first, k_end, _ = _piece(crow, number, grid_rows, TERMS, 0, BP)
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
