"""Kernels of the factored plans: the intermediate lives in registers and shared memory only.

All of them work on input blocks `s`, output blocks `o`, terms i of a sum, and tiles of C x D weights that turn an input block
into an output block. Forward and gradients assign different tensors to these roles. With `coeff` as (term, o, s),

    y[t, o] = sum over s and i of coeff[i, o, s] tile[bank, i] x[t, s]

is computed by mixing input blocks and then applying tiles, or the other way round. The bank of tiles belongs to the output
block (BANK_OF_OUTPUT) or to the input block. A program has BO output blocks of one bank, or of all, and takes BT rows of x at a
time. Of the input blocks it takes BK at a time: all, or if LISTED those in `sources` that any of its outputs is alive with.

Products on tensor cores need 16 terms of a sum. For tiles with fewer columns, SIDE rows are joined and multiplied by a matrix
with SIDE copies of the tile on its diagonal. BC and BD are C and D padded to powers of two. Sums have a fixed order.
"""

# pyright: reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from kronblocks.ops.backends.triton.products import dot


@triton.jit
def _outputs(chunk, outputs_per_bank, chunks_per_bank, BO: tl.constexpr):
    """The bank of a chunk, its first output block, and the end of the bank's."""
    bank = chunk // chunks_per_bank
    return bank, bank * outputs_per_bank + (chunk % chunks_per_bank) * BO, (bank + 1) * outputs_per_bank


@triton.jit
def list_live(live, sources, counts, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank,
              BANK_OF_OUTPUT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The input blocks that any output block of a chunk is alive with, in order, and how many; a program per chunk and bank."""
    chunk, bank = tl.program_id(0), tl.program_id(1)
    _, o_first, o_end = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    o = o_first + tl.arange(0, BO)
    begin = 0 if BANK_OF_OUTPUT else bank * sources_per_bank
    place = chunk * tl.num_programs(1) + bank
    found = 0
    for first in range(0, sources_per_bank, BK):
        k = first + tl.arange(0, BK)
        inside = (o < o_end)[:, None] & (k < sources_per_bank)[None, :]
        alive = tl.load(live + o[:, None] * out_stride + (begin + k)[None, :] * source_stride, mask=inside, other=0)
        wanted = tl.max(alive.to(tl.int32), 0)
        rank = found + tl.cumsum(wanted, 0) - 1
        tl.store(sources + place * sources_per_bank + rank, begin + k, mask=wanted != 0)
        found += tl.sum(wanted, 0)
    tl.store(counts + place, found)


@triton.jit
def _sources(k, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT: tl.constexpr, LISTED: tl.constexpr):
    """The k-th input blocks of a bank, and which of them exist."""
    if LISTED:
        exists = k < tl.load(counts + place)
        return tl.load(sources + place * sources_per_bank + k, mask=exists, other=0), exists
    begin = 0 if BANK_OF_OUTPUT else bank * sources_per_bank
    return begin + k, k < sources_per_bank


@triton.jit
def _diagonal(tiles, number, exists, d, c, C: tl.constexpr, D: tl.constexpr, FLIPPED: tl.constexpr):
    """Weight (d, c) of the transpose of each tile, 0 where none `exists`; FLIPPED: it is stored as (D, C)."""
    d_step, c_step = (C, 1) if FLIPPED else (1, D)
    place = tiles + number.to(tl.int64) * (C * D) + d[:, None] * d_step + c[None, :] * c_step
    return tl.load(place, mask=exists & (d < D)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def _tiles_below(tiles, bank, i, RANK: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
                 BD: tl.constexpr, SIDE: tl.constexpr, FLIPPED: tl.constexpr):  # fmt: skip
    """TERMS tiles from the i-th on, one below the other, each as SIDE copies of its transpose on the diagonal of a matrix."""
    row, column = tl.arange(0, TERMS * SIDE * BD), tl.arange(0, SIDE * BC)
    term = i + row // (SIDE * BD)
    exists = (row // BD % SIDE)[:, None] == (column // BC)[None, :]
    exists = exists & (term < RANK)[:, None]
    return _diagonal(tiles, (bank * RANK + term)[:, None], exists, row % BD, column % BC, C, D, FLIPPED)


@triton.jit
def _tiles_beside(tiles, bank, i, RANK: tl.constexpr, TERMS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
                  BD: tl.constexpr, SIDE: tl.constexpr, FLIPPED: tl.constexpr):  # fmt: skip
    """The same, one beside the other."""
    row, column = tl.arange(0, SIDE * BD), tl.arange(0, TERMS * SIDE * BC)
    term = i + column // (SIDE * BC)
    exists = (row // BD)[:, None] == (column // BC % SIDE)[None, :]
    exists = exists & (term < RANK)[None, :]
    return _diagonal(tiles, (bank * RANK + term)[None, :], exists, row % BD, column % BC, C, D, FLIPPED)


@triton.jit
def _coefficients(coeff, i, o_first, o_end, s, s_exists, term_stride, out_stride, source_stride,
                  RANK: tl.constexpr, TERMS: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """Of TERMS terms, BO output blocks each, and input blocks s: (TERMS*BO, BK)."""
    row = tl.arange(0, TERMS * BO)
    term, o = i + row // BO, o_first + row % BO
    place = coeff + (term * term_stride + o * out_stride)[:, None] + s[None, :] * source_stride
    return tl.load(place, mask=((term < RANK) & (o < o_end))[:, None] & s_exists[None, :], other=0.0)


@triton.jit
def _beside(mixed, TERMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(TERMS, ROWS, COLUMNS) as (ROWS, TERMS*COLUMNS)."""
    return tl.reshape(tl.permute(tl.reshape(mixed, (TERMS, ROWS, COLUMNS)), (1, 0, 2)), (ROWS, TERMS * COLUMNS))


@triton.jit
def _store(y, total, bias, first, end, o_first, o_end, stride, C: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
           BT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """y[first + t, o, c] = total[o, t, c] + bias[o, c]; total is (BO, BT*BC)."""
    o, column = o_first + tl.arange(0, BO), tl.arange(0, BT * BC)
    t, c = first + column // BC, column % BC
    inside = (o < o_end)[:, None] & ((t < end) & (c < C))[None, :]
    feature = o[:, None] * C + c[None, :]
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=inside, other=0.0).to(total.dtype)
    tl.store(y + t[None, :].to(tl.int64) * stride + feature, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _columns(x, first, end, s, s_exists, stride, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """BT rows of the input blocks s, (BK, BT*BD)."""
    column = tl.arange(0, BT * BD)
    t, d = first + column // BD, column % BD
    return tl.load(
        x + t[None, :].to(tl.int64) * stride + s[:, None] * D + d[None, :],
        mask=s_exists[:, None] & ((t < end) & (d < D))[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def mix_then_tile(
    x, coeff, tiles, bias, other, y, dtiles, sources, counts, rows, share, x_stride, other_stride, y_stride,
    term_stride, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank, chunks, programs,
    RANK: tl.constexpr, BANKS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SIDE: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, TERMS: tl.constexpr, FLIPPED: tl.constexpr,
    LISTED: tl.constexpr, BANK_OF_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRODUCT: tl.constexpr, GRADIENT: tl.constexpr,
    PARTS: tl.constexpr, WHOLE: tl.constexpr, SPREAD: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The mixtures u[i, o, t] of input blocks; if PRODUCT y[t, o] from them, and if GRADIENT the gradient of the tiles,

        dtiles[program, bank, i] = sum over o and t of other[t, o]^T u[i, o, t],

    where `other` is the gradient of y, or the input of the tiles where y is a gradient. A program has `share` rows, and PARTS of
    the parts that the sum over banks and terms has: all for y, one for a gradient, which stays in registers. Where that is one
    and BK is all of its input blocks (WHOLE), its coefficients and tiles are loaded once for all of its rows.

    Of small tiles SPREAD rows are taken side by side for the gradient: dtiles is (SPREAD*BC, SPREAD*BD), and the gradient is the
    sum of its diagonal blocks.
    """
    groups: tl.constexpr = (RANK + TERMS - 1) // TERMS
    program, part = tl.program_id(0) % programs, tl.program_id(0) // programs
    chunk, split = program % chunks, program // chunks
    bank_of_chunk, o_first, o_end = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    step, row, height = tl.arange(0, BK), tl.arange(0, BO * BT // SPREAD), tl.arange(0, SPREAD * BC)
    begin, end = split * share, tl.minimum((split + 1) * share, rows)
    if WHOLE:
        bank, i = part // groups, part % groups * TERMS
        s, s_exists = _sources(step, bank, chunk * BANKS + bank, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
        c = _coefficients(coeff, i, o_first, o_end, s, s_exists, term_stride, out_stride, source_stride, RANK, TERMS, BO)
        if PRODUCT:
            b = _tiles_below(
                tiles, bank_of_chunk if BANK_OF_OUTPUT else bank, i, RANK, TERMS, C, D, BC, BD, SIDE, FLIPPED
            )  # fmt: skip
    if GRADIENT:
        g = tl.zeros((SPREAD * BC, TERMS * SPREAD * BD), SUM)
    for first in range(begin, end, BT):
        total = tl.zeros((BO * BT // SIDE, SIDE * BC), SUM)
        for following in range(PARTS):
            u = tl.zeros((TERMS * BO, BT * BD), SUM)
            if WHOLE:
                u = dot(c, _columns(x, first, end, s, s_exists, x_stride, D, BD, BT), u, PRECISION, SUM)
            else:
                bank, i = (part + following) // groups, (part + following) % groups * TERMS
                place = chunk * BANKS + bank
                for k in range(0, tl.load(counts + place) if LISTED else sources_per_bank, BK):
                    s, s_exists = _sources(k + step, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
                    c = _coefficients(
                        coeff, i, o_first, o_end, s, s_exists, term_stride, out_stride, source_stride, RANK, TERMS, BO
                    )  # fmt: skip
                    u = dot(c, _columns(x, first, end, s, s_exists, x_stride, D, BD, BT), u, PRECISION, SUM)
                if PRODUCT:
                    b = _tiles_below(
                        tiles, bank_of_chunk if BANK_OF_OUTPUT else bank, i, RANK, TERMS, C, D, BC, BD, SIDE, FLIPPED
                    )  # fmt: skip
            mixed = u.to(x.dtype.element_ty)
            if PRODUCT:
                total = dot(_beside(mixed, TERMS, BO * BT // SIDE, SIDE * BD), b, total, PRECISION, SUM)
            if GRADIENT:
                t = first + (row % (BT // SPREAD))[None, :] * SPREAD + (height // BC)[:, None]
                o = o_first + (row // (BT // SPREAD))[None, :]
                e = tl.load(
                    other + t.to(tl.int64) * other_stride + o * C + (height % BC)[:, None],
                    mask=(o < o_end) & (t < end) & (height % BC < C)[:, None], other=0.0,
                )  # fmt: skip
                g = dot(e, _beside(mixed, TERMS, BO * BT // SPREAD, SPREAD * BD), g, PRECISION, SUM)
        if PRODUCT:
            _store(y, tl.reshape(total, (BO, BT * BC)), bias, first, end, o_first, o_end, y_stride, C, BC, BO, BT, HAS_BIAS)
    if GRADIENT:
        column = tl.arange(0, TERMS * SPREAD * BD)
        term = part % groups * TERMS + column // (SPREAD * BD)
        number = (program * BANKS + part // groups) * RANK + term
        to = dtiles + number.to(tl.int64)[None, :] * (SPREAD * BC * SPREAD * BD)
        to += height[:, None] * (SPREAD * BD) + (column % (SPREAD * BD))[None, :]
        tl.store(to, g, mask=(term < RANK)[None, :])


@triton.jit
def _inputs(x, k, first, end, bank, place, sources, counts, sources_per_bank, stride, D: tl.constexpr, BD: tl.constexpr,
            SIDE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BANK_OF_OUTPUT: tl.constexpr,
            LISTED: tl.constexpr):  # fmt: skip
    """BT rows of the BK input blocks from the k-th on, as (BK*BT/SIDE, SIDE*BD); addresses of a row of it are contiguous."""
    row, column = tl.arange(0, BK * BT // SIDE), tl.arange(0, SIDE * BD)
    s, s_exists = _sources(k + row // (BT // SIDE), bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
    t, d = first + (row % (BT // SIDE))[:, None] * SIDE + (column // BD)[None, :], column % BD
    return tl.load(
        x + t.to(tl.int64) * stride + s[:, None] * D + d[None, :],
        mask=s_exists[:, None] & (t < end) & (d < D)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def tile_then_mix(
    x, coeff, tiles, bias, y, sources, counts, rows, x_stride, y_stride,
    term_stride, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank, chunks,
    RANK: tl.constexpr, BANKS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SIDE: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, FLIPPED: tl.constexpr, LISTED: tl.constexpr,
    BANK_OF_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """y[t, o], a tile of each term on input blocks first, then their mixture."""
    program = tl.program_id(0)
    chunk, first = program % chunks, (program // chunks) * BT
    bank_of_chunk, o_first, o_end = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    step = tl.arange(0, BK)
    total = tl.zeros((BO, BT * BC), SUM)
    for bank in range(BANKS):
        place = chunk * BANKS + bank
        count = tl.load(counts + place) if LISTED else sources_per_bank
        for k in range(0, count, BK):
            s, s_exists = _sources(k + step, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
            a = _inputs(
                x, k, first, rows, bank, place, sources, counts, sources_per_bank, x_stride, D, BD, SIDE, BT, BK, BANK_OF_OUTPUT,
                LISTED,
            )  # fmt: skip
            for i in range(RANK):
                b = _tiles_beside(
                    tiles, bank_of_chunk if BANK_OF_OUTPUT else bank, i, RANK, 1, C, D, BC, BD, SIDE, FLIPPED
                )  # fmt: skip
                z = dot(a, b, tl.zeros((BK * BT // SIDE, SIDE * BC), SUM), PRECISION, SUM)
                c = _coefficients(coeff, i, o_first, o_end, s, s_exists, term_stride, out_stride, source_stride, RANK, 1, BO)
                total = dot(c, tl.reshape(z.to(a.dtype), (BK, BT * BC)), total, PRECISION, SUM)
    _store(y, total, bias, first, rows, o_first, o_end, y_stride, C, BC, BO, BT, HAS_BIAS)


@triton.jit
def mix_gradient(
    x, tiles, other, out, sources, counts, rows, share, x_stride, other_stride,
    split_stride, term_stride, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank,
    RANK: tl.constexpr, BANKS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SIDE: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, FLIPPED: tl.constexpr, LISTED: tl.constexpr,
    BANK_OF_OUTPUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, i, o, s] = sum over t of <other[t, o], tile[bank, i] x[t, s]>; a program per split, chunk, BK inputs and TERMS
    terms, whose sums it keeps in registers while it goes through the rows once.
    """
    chunk, split = tl.program_id(1), tl.program_id(2)
    groups: tl.constexpr = (RANK + TERMS - 1) // TERMS
    parts = tl.cdiv(sources_per_bank, BK)
    i, part_of_bank = (tl.program_id(0) % groups) * TERMS, tl.program_id(0) // groups
    bank, part = part_of_bank // parts, part_of_bank % parts
    place = chunk * BANKS + bank
    bank_of_chunk, o_first, o_end = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    o, column = o_first + tl.arange(0, BO), tl.arange(0, BT * BC)
    c = column % BC
    begin, end = split * share, tl.minimum((split + 1) * share, rows)
    if part * BK < (tl.load(counts + place) if LISTED else sources_per_bank):
        b = _tiles_beside(tiles, bank_of_chunk if BANK_OF_OUTPUT else bank, i, RANK, TERMS, C, D, BC, BD, SIDE, FLIPPED)
        g = tl.zeros((BO, TERMS * BK), SUM)
        for first in range(begin, end, BT):
            t = first + column // BC
            e = tl.load(
                other + t[None, :].to(tl.int64) * other_stride + o[:, None] * C + c[None, :],
                mask=(o < o_end)[:, None] & ((t < end) & (c < C))[None, :], other=0.0,
            )  # fmt: skip
            a = _inputs(
                x, part * BK, first, end, bank, place, sources, counts, sources_per_bank, x_stride, D, BD, SIDE, BT, BK,
                BANK_OF_OUTPUT, LISTED,
            )  # fmt: skip
            z = dot(a, b, tl.zeros((BK * BT // SIDE, TERMS * SIDE * BC), SUM), PRECISION, SUM).to(a.dtype)
            z = tl.permute(tl.reshape(z, (BK, BT // SIDE, TERMS, SIDE * BC)), (1, 3, 2, 0))
            g = dot(e, tl.reshape(z, (BT * BC, TERMS * BK)), g, PRECISION, SUM)
        k = tl.arange(0, TERMS * BK)
        term = i + k // BK
        s, s_exists = _sources(part * BK + k % BK, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
        to = out + split.to(tl.int64) * split_stride + (term * term_stride + s * source_stride)[None, :] + o[:, None] * out_stride
        tl.store(to, g, mask=(o < o_end)[:, None] & (s_exists & (term < RANK))[None, :])
