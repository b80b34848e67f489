"""Kernels of the factored plans: the intermediate lives in registers and shared memory only.

All of them see blocks of inputs `s`, blocks of outputs `o`, terms i of a sum, and tiles of C x D weights that turn an input block
into an output block; forward and gradients differ in what plays these parts. With `coeff` seen as (term, o, s),

    y[t, o] = sum over s and i of coeff[i, o, s] tile[bank, i] x[t, s]

is computed by mixing input blocks and then applying tiles, or the other way round. The bank of tiles belongs to the output
block (BANK_OF_OUTPUT) or to the input block. A program has BO output blocks of one bank, or of all, and takes BT rows of x at a
time. Of the input blocks it takes BK at a time: all, or if LISTED those in `sources` that any of its outputs is alive with.

Products on tensor cores want 16 terms of a sum: of tiles with fewer columns SIDE rows are taken side by side, times a matrix with
SIDE copies of the tile on its diagonal. BC and BD are C and D padded to powers of two. Sums have a fixed order.
"""

# pyright: reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def list_live(live, sources, counts, outputs, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank,
              BANK_OF_OUTPUT: tl.constexpr, BO: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The input blocks that any output block of a chunk is alive with, in order, and how many; a program per chunk and bank."""
    chunk, bank = tl.program_id(0), tl.program_id(1)
    local = (chunk % chunks_per_bank) * BO + tl.arange(0, BO)
    o = (chunk // chunks_per_bank) * outputs_per_bank + local
    begin = 0 if BANK_OF_OUTPUT else bank * sources_per_bank
    place = chunk * tl.num_programs(1) + bank
    found = 0
    for first in range(0, sources_per_bank, BK):
        k = first + tl.arange(0, BK)
        inside = (local < outputs_per_bank)[:, None] & (k < sources_per_bank)[None, :]
        alive = tl.load(live + o[:, None] * out_stride + (begin + k)[None, :] * source_stride, mask=inside, other=0)
        wanted = tl.max(alive.to(tl.int32), 0)
        rank = found + tl.cumsum(wanted, 0) - 1
        tl.store(sources + place * sources_per_bank + rank, begin + k, mask=wanted != 0)
        found += tl.sum(wanted, 0)
    tl.store(counts + place, found)


@triton.jit
def _outputs(chunk, outputs_per_bank, chunks_per_bank, BO: tl.constexpr):
    """The output blocks of a chunk, and which of them exist."""
    local = (chunk % chunks_per_bank) * BO + tl.arange(0, BO)
    return (chunk // chunks_per_bank) * outputs_per_bank + local, local < outputs_per_bank


@triton.jit
def _sources(k, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT: tl.constexpr, LISTED: tl.constexpr):
    """The k-th input blocks of a bank, and which of them exist."""
    if LISTED:
        exists = k < tl.load(counts + place)
        return tl.load(sources + place * sources_per_bank + k, mask=exists, other=0), exists
    begin = 0 if BANK_OF_OUTPUT else bank * sources_per_bank
    return begin + k, k < sources_per_bank


@triton.jit
def _tile(tiles, number, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr,
          FLIPPED: tl.constexpr):  # fmt: skip
    """SIDE copies of a tile's transpose on the diagonal of a (SIDE*BD, SIDE*BC) matrix; FLIPPED: it is stored as (D, C)."""
    row, column = tl.arange(0, SIDE * BD), tl.arange(0, SIDE * BC)
    d, c = row % BD, column % BC
    inside = (row // BD)[:, None] == (column // BC)[None, :]
    inside = inside & (d < D)[:, None] & (c < C)[None, :]
    d_step, c_step = (C, 1) if FLIPPED else (1, D)
    return tl.load(tiles + number.to(tl.int64) * (C * D) + d[:, None] * d_step + c[None, :] * c_step, mask=inside, other=0.0)


@triton.jit
def _coefficients(coeff, i, o, o_exists, s, s_exists, term_stride, out_stride, source_stride):
    place = coeff + i * term_stride + o[:, None] * out_stride + s[None, :] * source_stride
    return tl.load(place, mask=o_exists[:, None] & s_exists[None, :], other=0.0)


@triton.jit
def _store(y, total, bias, first, rows, o, o_exists, stride, C: tl.constexpr, BC: tl.constexpr, BO: tl.constexpr,
           BT: tl.constexpr, HAS_BIAS: tl.constexpr):  # fmt: skip
    """y[first + t, o, c] = total[o, t, c] + bias[o, c]; total is (BO, BT*BC)."""
    column = tl.arange(0, BT * BC)
    t, c = first + column // BC, column % BC
    inside = o_exists[:, None] & ((t < rows) & (c < C))[None, :]
    feature = o[:, None] * C + c[None, :]
    if HAS_BIAS:
        total += tl.load(bias + feature, mask=inside, other=0.0).to(total.dtype)
    tl.store(y + t[None, :].to(tl.int64) * stride + feature, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def mix_then_tile(
    x, coeff, tiles, bias, other, y, dtiles, sources, counts, rows, share, x_stride, other_stride, y_stride,
    term_stride, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank, chunks,
    RANK: tl.constexpr, BANKS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SIDE: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, FLIPPED: tl.constexpr, LISTED: tl.constexpr,
    BANK_OF_OUTPUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRODUCT: tl.constexpr, GRADIENT: tl.constexpr, SPREAD: tl.constexpr,
    PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The mixtures u[o, t] of input blocks of a term; if PRODUCT y[t, o] from them, and if GRADIENT the gradient of the tiles,

        dtiles[program, bank, i] = sum over o and t of other[t, o]^T u[o, t],

    where `other` is the gradient of y, or the input of the tiles where y is a gradient. A program has `share` rows. Of small
    tiles SPREAD rows are taken side by side: dtiles is (SPREAD*BC, SPREAD*BD), and the gradient the sum of its diagonal blocks.
    """
    program = tl.program_id(0)
    chunk, split = program % chunks, program // chunks
    o, o_exists = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    column, step = tl.arange(0, BT * BD), tl.arange(0, BK)
    d, row, height = column % BD, tl.arange(0, BO * BT // SPREAD), tl.arange(0, SPREAD * BC)
    o_first = (chunk // chunks_per_bank) * outputs_per_bank + (chunk % chunks_per_bank) * BO
    o_end = (chunk // chunks_per_bank + 1) * outputs_per_bank
    begin, end = split * share, tl.minimum((split + 1) * share, rows)
    for first in range(begin, end, BT):
        t = first + column // BD
        t_exists = (t < end) & (d < D)
        total = tl.zeros((BO * BT // SIDE, SIDE * BC), SUM)
        for bank in range(BANKS):
            place = chunk * BANKS + bank
            count = tl.load(counts + place) if LISTED else sources_per_bank
            own_bank = chunk // chunks_per_bank if BANK_OF_OUTPUT else bank
            for i in range(RANK):
                u = tl.zeros((BO, BT * BD), SUM)
                for k in range(0, count, BK):
                    s, s_exists = _sources(k + step, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
                    c = _coefficients(coeff, i, o, o_exists, s, s_exists, term_stride, out_stride, source_stride)
                    a = tl.load(
                        x + t[None, :].to(tl.int64) * x_stride + s[:, None] * D + d[None, :],
                        mask=s_exists[:, None] & t_exists[None, :], other=0.0,
                    )  # fmt: skip
                    u = tl.dot(c, a, u, input_precision=PRECISION, out_dtype=SUM)
                mixed = u.to(x.dtype.element_ty)
                if PRODUCT:
                    b = _tile(tiles, own_bank * RANK + i, C, D, BC, BD, SIDE, FLIPPED)
                    total = tl.dot(
                        tl.reshape(mixed, (BO * BT // SIDE, SIDE * BD)), b, total, input_precision=PRECISION, out_dtype=SUM
                    )
                if GRADIENT:
                    own_t = first + (row % (BT // SPREAD))[None, :] * SPREAD + (height // BC)[:, None]
                    own_o = o_first + (row // (BT // SPREAD))[None, :]
                    e = tl.load(
                        other + own_t.to(tl.int64) * other_stride + own_o * C + (height % BC)[:, None],
                        mask=(own_o < o_end) & (own_t < end) & (height % BC < C)[:, None], other=0.0,
                    )  # fmt: skip
                    g = tl.dot(e, tl.reshape(mixed, (BO * BT // SPREAD, SPREAD * BD)), input_precision=PRECISION, out_dtype=SUM)
                    number = (program * BANKS + bank) * RANK + i
                    to = dtiles + number.to(tl.int64) * (SPREAD * BC * SPREAD * BD)
                    to += height[:, None] * (SPREAD * BD) + tl.arange(0, SPREAD * BD)[None, :]
                    if first > begin:
                        tl.debug_barrier()  # what other threads have added
                        g += tl.load(to)
                    tl.store(to, g)
        if PRODUCT:
            _store(y, tl.reshape(total, (BO, BT * BC)), bias, first, end, o, o_exists, y_stride, C, BC, BO, BT, HAS_BIAS)


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
def _tiled(a, tiles, number, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, SIDE: tl.constexpr,
           BT: tl.constexpr, BK: tl.constexpr, FLIPPED: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """A tile on `_inputs`, (BK, BT*BC)."""
    b = _tile(tiles, number, C, D, BC, BD, SIDE, FLIPPED)
    z = tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)
    return tl.reshape(z.to(a.dtype), (BK, BT * BC))


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
    o, o_exists = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    step = tl.arange(0, BK)
    total = tl.zeros((BO, BT * BC), SUM)
    for bank in range(BANKS):
        place = chunk * BANKS + bank
        count = tl.load(counts + place) if LISTED else sources_per_bank
        own_bank = chunk // chunks_per_bank if BANK_OF_OUTPUT else bank
        for k in range(0, count, BK):
            s, s_exists = _sources(k + step, bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
            a = _inputs(
                x, k, first, rows, bank, place, sources, counts, sources_per_bank, x_stride, D, BD, SIDE, BT, BK, BANK_OF_OUTPUT,
                LISTED,
            )  # fmt: skip
            for i in range(RANK):
                z = _tiled(a, tiles, own_bank * RANK + i, C, D, BC, BD, SIDE, BT, BK, FLIPPED, PRECISION, SUM)
                c = _coefficients(coeff, i, o, o_exists, s, s_exists, term_stride, out_stride, source_stride)
                total = tl.dot(c, z, total, input_precision=PRECISION, out_dtype=SUM)
    _store(y, total, bias, first, rows, o, o_exists, y_stride, C, BC, BO, BT, HAS_BIAS)


@triton.jit
def mix_gradient(
    x, tiles, other, out, sources, counts, rows, share, x_stride, other_stride,
    split_stride, term_stride, out_stride, source_stride, outputs_per_bank, chunks_per_bank, sources_per_bank,
    RANK: tl.constexpr, BANKS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    SIDE: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, FLIPPED: tl.constexpr, LISTED: tl.constexpr,
    BANK_OF_OUTPUT: tl.constexpr, TERMS: tl.constexpr, PRECISION: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out[split, i, o, s] = sum over t of <other[t, o], tile[bank, i] x[t, s]>; a program per split, chunk, BK inputs and TERMS,
    one or two, of the terms, whose sums it keeps in registers while it goes through the rows once.
    """
    split, chunk = tl.program_id(0), tl.program_id(1)
    groups: tl.constexpr = (RANK + TERMS - 1) // TERMS
    parts = tl.cdiv(sources_per_bank, BK)
    i, part_of_bank = (tl.program_id(2) % groups) * TERMS, tl.program_id(2) // groups
    bank, part = part_of_bank // parts, part_of_bank % parts
    place = chunk * BANKS + bank
    own_bank = chunk // chunks_per_bank if BANK_OF_OUTPUT else bank
    o, o_exists = _outputs(chunk, outputs_per_bank, chunks_per_bank, BO)
    s, s_exists = _sources(part * BK + tl.arange(0, BK), bank, place, sources, counts, sources_per_bank, BANK_OF_OUTPUT, LISTED)
    column = tl.arange(0, BT * BC)
    c = column % BC
    begin, end = split * share, tl.minimum((split + 1) * share, rows)
    count = tl.load(counts + place) if LISTED else sources_per_bank
    if part * BK < count:
        number = own_bank * RANK + i
        following = own_bank * RANK + tl.minimum(i + 1, RANK - 1)  # where there is none, what is not stored
        g = tl.zeros((BO, BK), SUM)
        g1 = tl.zeros((BO, BK), SUM)
        for first in range(begin, end, BT):
            t = first + column // BC
            e = tl.load(
                other + t[None, :].to(tl.int64) * other_stride + o[:, None] * C + c[None, :],
                mask=o_exists[:, None] & ((t < end) & (c < C))[None, :], other=0.0,
            )  # fmt: skip
            a = _inputs(
                x, part * BK, first, end, bank, place, sources, counts, sources_per_bank, x_stride, D, BD, SIDE, BT, BK,
                BANK_OF_OUTPUT, LISTED,
            )  # fmt: skip
            z = _tiled(a, tiles, number, C, D, BC, BD, SIDE, BT, BK, FLIPPED, PRECISION, SUM)
            g = tl.dot(e, tl.trans(z), g, input_precision=PRECISION, out_dtype=SUM)
            if TERMS > 1:
                z = _tiled(a, tiles, following, C, D, BC, BD, SIDE, BT, BK, FLIPPED, PRECISION, SUM)
                g1 = tl.dot(e, tl.trans(z), g1, input_precision=PRECISION, out_dtype=SUM)
        to = out + split.to(tl.int64) * split_stride + o[:, None] * out_stride + s[None, :] * source_stride
        exists = o_exists[:, None] & s_exists[None, :]
        tl.store(to + i * term_stride, g, mask=exists)
        if TERMS > 1:
            tl.store(to + (i + 1) * term_stride, g1, mask=exists & (i + 1 < RANK))
