"""Blocks from factors and back to their gradients: the live ones in a list, or all of W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kronblocks.ops.backends.triton import trust
from kronblocks.ops.backends.triton.launch import PROGRAMS, arithmetic, cells, launch, padded, sum_dtype
from kronblocks.ops.index import BlockIndex


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the entries, (capacity, bm, bn); 0 behind them."""
    values = tiles.new_empty(len(index.slot), *tiles.shape[2:])
    _build(values, coeff, tiles, len(index.slot), index, None)
    return values


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    return _gradients(dvalues, coeff, tiles, len(index.slot), index, None)


def weight(coeff: Tensor, tiles: Tensor, live: Tensor | None) -> Tensor:
    """W, (m, n), dead blocks 0."""
    (m1, n1, _), (_, _, bm, bn) = coeff.shape, tiles.shape
    built = tiles.new_empty(m1 * bm, n1 * bn)
    _build(built, coeff, tiles, m1 * n1, None, live)
    return built


def weight_backward(dweight: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles, from dW (m, n)."""
    return _gradients(dweight, coeff, tiles, coeff.shape[0] * coeff.shape[1], None, live)


def _entries(
    coeff: Tensor, tiles: Tensor, index: BlockIndex | None, live: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that say which blocks there are and where; and what is known of them when compiling."""
    m1, n1, rank = coeff.shape
    listed = (None, None, None) if index is None else (index.crow, index.col, index.row)
    mask = None if live is None else live.contiguous().view(torch.uint8)
    known = {"RANK": rank, "W": tiles.shape[3], "AREA": tiles.shape[2] * tiles.shape[3]}
    known |= {"WHOLE": index is None, "MASKED": mask is not None}
    return (*listed, mask, m1, n1, m1 // tiles.shape[0]), known


def _require(kernel: str, coeff: Tensor, tiles: Tensor, index: BlockIndex | None, live: Tensor | None) -> None:
    """Raise Refused where the kernel may not serve."""
    about = {"rank": coeff.shape[2], "groups": tiles.shape[0], "tile": tuple(tiles.shape[2:]), "live": live is not None}
    unit = trust.unit_of(kernel if index is not None else f"{kernel}, whole", about, tiles.dtype, None)
    trust.require(unit, tiles.device)


def _at_a_time(area: int) -> tuple[int, int]:
    """How many entries, and weights of each, one program takes."""
    step = min(256 if area < 2**20 else 1024, padded(area))  # of what a launch may have side by side
    return max(1, 1024 // step), step


def _build(values: Tensor, coeff: Tensor, tiles: Tensor, capacity: int, index: BlockIndex | None, live: Tensor | None) -> None:
    from kronblocks.ops.backends.triton import weights_kernels as kernels

    _require("blocks", coeff, tiles, index, live)
    coeff, tiles = coeff.contiguous(), tiles.contiguous()
    entries, known = _entries(coeff, tiles, index, live)
    several, step = _at_a_time(known["AREA"])
    launch(
        kernels.blocks_from_factors, (cells(capacity, several), cells(known["AREA"], step)),
        coeff, tiles, values, *entries, capacity, **known, BK=several, BA=step, SUM=arithmetic(tiles.dtype)["SUM"],
    )  # fmt: skip


def _gradients(
    dvalues: Tensor, coeff: Tensor, tiles: Tensor, capacity: int, index: BlockIndex | None, live: Tensor | None
) -> tuple[Tensor, Tensor]:
    from kronblocks.ops.backends.triton import weights_kernels as kernels

    _require("gradients of blocks", coeff, tiles, index, live)
    dvalues, coeff, tiles = dvalues.contiguous(), coeff.contiguous(), tiles.contiguous()
    entries, known = _entries(coeff, tiles, index, live)
    (groups, rank), area, exact = tiles.shape[:2], known["AREA"], arithmetic(tiles.dtype)
    several, width = _at_a_time(area)
    dcoeff = torch.zeros_like(coeff)
    launch(
        kernels.coeff_gradient, (cells(capacity, several), rank),
        dvalues, tiles, dcoeff, *entries, **known, BK=several, BA=width, SUM=exact["SUM"],
    )  # fmt: skip
    step = max(16, width)
    splits = max(1, min(PROGRAMS // (groups * cells(area, step)), cells(capacity, 64 * groups)))
    dtiles = tiles.new_zeros(splits, *tiles.shape, dtype=sum_dtype(tiles))
    launch(
        kernels.tiles_gradient, (groups if capacity else 0, splits, cells(area, step)),
        dvalues, coeff, dtiles, *entries, splits, **known, BR=padded(rank, 16), BK=32, BA=step, **exact,
    )  # fmt: skip
    return dcoeff, dtiles.sum(0).to(tiles.dtype)


def scatter(values: Tensor, index: BlockIndex) -> Tensor:
    """W, (m, n), from its live blocks."""
    (m1, n1), (_, bm, bn) = index.grid, values.shape
    built = values.new_zeros(m1 * bm, n1 * bn)
    _copy(values.contiguous(), built, index, gather=False)
    return built


def gather(matrix: Tensor, index: BlockIndex, height: int, width: int) -> Tensor:
    """The live blocks of a matrix in their slots; 0 in the others."""
    values = matrix.new_zeros(len(index.slot), height, width)
    _copy(values, matrix.contiguous(), index, gather=True)
    return values


def _copy(values: Tensor, matrix: Tensor, index: BlockIndex, *, gather: bool) -> None:
    from kronblocks.ops.backends.triton import weights_kernels as kernels

    capacity, height, width = values.shape
    trust.require(trust.unit_of("copy", {"block": (height, width)}, values.dtype, None), values.device)
    several, step = _at_a_time(height * width)
    launch(
        kernels.scatter, (cells(capacity, several), cells(height * width, step)),
        values, matrix, index.crow, index.col, index.row, index.slot, *index.grid,
        W=width, AREA=height * width, BK=several, BA=step, GATHER=gather,
    )  # fmt: skip
