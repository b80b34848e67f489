"""Kernels for NVIDIA GPUs, written in Triton: float32, float16 and bfloat16 with sums in float32 (float64 in its interpreter).

Blocks from 16 to 128 go through tensor cores; smaller and larger ones, and the dense plan, build W on the device and leave the
product to cuBLAS. The factored plans are PyTorch's own operators still.

With TRITON_INTERPRET=1 set before this module is loaded the kernels run on a CPU, which is how they are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kronblocks.ops.backends import torch as plain

if TYPE_CHECKING:
    from kronblocks.ops.packed import BlockIndex

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST, _LARGEST = 16, 128  # sides of a block that tensor cores take whole
_SPLIT_ROWS = 1024  # of a sum over rows, at least, for one program
_PROGRAMS = 512  # enough to fill a GPU: sums over rows are split until there are as many


@functools.cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def serves(device: str, dtype: torch.dtype) -> bool:
    """Whether these kernels compute for a device type and dtype.

    Only where KRONBLOCKS_TRITON=1 asks for them, as long as they have been compiled for GPUs but run on none.
    """
    wanted = os.environ.get("KRONBLOCKS_TRITON") == "1"
    return wanted and device == "cuda" and dtype in DTYPES and torch.version.hip is None and is_installed()


@functools.cache
def build() -> str:
    """Which compiler made the kernels: timings of another one's do not count."""
    import triton

    return triton.__version__


@functools.cache
def _kernels() -> Any:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what it does anyway; unset it warns
    from kronblocks.ops.backends import triton_kernels

    return triton_kernels


def _padded(size: int, least: int = _SMALLEST) -> int:
    """The power of two from a size on."""
    return max(least, 1 << (size - 1).bit_length())


def _cells(count: int, size: int) -> int:
    return -(-count // size)


def _arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How products are taken and summed: in float32 as precisely as torch.get_float32_matmul_precision says. "highest" takes
    three products of TF32, which together are as good as one of float32.
    """
    import triton.language as tl

    total = tl.float64 if dtype == torch.float64 else tl.float32
    precise = dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": ("ieee" if dtype == torch.float64 else "tf32x3") if precise else "tf32", "SUM": total}


def _fits(height: int, width: int) -> bool:
    return min(height, width) >= _SMALLEST and max(height, width) <= _LARGEST


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    if not _fits(*values.shape[1:]):
        return torch.nn.functional.linear(x, _weight(values, index), bias)
    return _product(x, values, bias, index, transposed=False)


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    if not _fits(*values.shape[1:]):
        return dy @ _weight(values, index)
    return _product(dy, values, None, index, transposed=True)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, *, transposed: bool) -> Tensor:
    x, values = x.contiguous(), values.contiguous()
    _, bm, bn = values.shape
    height, width, columns = (bn, bm, index.grid[1]) if transposed else (bm, bn, index.grid[0])
    rows, step = x.shape[0], 64 if x.shape[0] > 1024 else 32
    chunk = min(32 if x.element_size() > 2 else 64, _padded(width))  # as much as fits the shared memory of any GPU, three deep
    y = x.new_empty(rows, columns * height)
    if y.numel():
        _kernels().product[(columns * _cells(rows, step),)](
            x, values, bias, y, index.ccol if transposed else index.crow, index.row if transposed else index.col, index.slot,
            index.order, rows, columns, x.shape[1], y.shape[1],
            H=height, W=width, BH=_padded(height), BW=chunk, BT=step,
            TRANSPOSED=transposed, HAS_BIAS=bias is not None, num_warps=4, **_arithmetic(x.dtype),
        )  # fmt: skip
    return y


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    (m1, n1), rows, capacity = index.grid, x.shape[0], len(index.slot)
    height, width = dy.shape[1] // m1, x.shape[1] // n1
    if not _fits(height, width):
        return _gathered(dy.t() @ x, index, height, width)
    dy, x = dy.contiguous(), x.contiguous()
    splits = max(1, min(_cells(_PROGRAMS, max(1, capacity)), _cells(rows, _SPLIT_ROWS)))
    shape = (capacity, height, width)
    out = dy.new_zeros(shape) if splits == 1 else dy.new_zeros(splits, *shape, dtype=_sum_dtype(dy))
    if rows and capacity:
        share = _cells(_cells(rows, splits), 32) * 32
        _kernels().grad_values[(capacity, splits)](
            dy, x, out, index.crow, index.col, index.row, index.slot, rows, m1, dy.shape[1], x.shape[1], share,
            capacity * height * width, H=height, W=width, BH=_padded(height), BW=_padded(width), BT=32,
            num_warps=4 if height * width <= 4096 else 8, **_arithmetic(x.dtype),
        )  # fmt: skip
    return out if splits == 1 else out.sum(0).to(dy.dtype)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _weight(values: Tensor, index: BlockIndex) -> Tensor:
    """W, (m, n), from its live blocks."""
    (m1, n1), (_, bm, bn) = index.grid, values.shape
    weight = values.new_zeros(m1 * bm, n1 * bn)
    _copy(values.contiguous(), weight, index, bm, bn, gather=False)
    return weight


def _gathered(weight: Tensor, index: BlockIndex, height: int, width: int) -> Tensor:
    """The live blocks of a matrix in their slots."""
    values = weight.new_zeros(len(index.slot), height, width)
    _copy(values, weight.contiguous(), index, height, width, gather=True)
    return values


def _copy(values: Tensor, weight: Tensor, index: BlockIndex, height: int, width: int, *, gather: bool) -> None:
    area, capacity = height * width, len(index.slot)
    step = min(1024, _padded(area, 1))
    several = max(1, 1024 // step)
    if capacity:
        _kernels().scatter[(_cells(capacity, several), _cells(area, step))](
            values, weight, index.crow, index.col, index.row, index.slot, index.grid[0], weight.shape[1],
            H=height, W=width, AREA=area, BK=several, BA=step, GATHER=gather,
        )  # fmt: skip


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: str) -> Tensor:
    """y = x W^T + bias by a factored plan; x (rows, n) -> (rows, m)."""
    return plain.kron_linear(x, coeff, tiles, bias, live, plan)


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: str, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles."""
    return plain.kron_backward(dy, x, coeff, tiles, live, plan, input_grad)


def _entries_at_a_time(area: int) -> tuple[int, int]:
    """How many entries, and weights of each, one program takes."""
    step = min(256, _padded(area, 1))
    return max(1, 1024 // step), step


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the entries, (capacity, bm, bn); 0 behind them."""
    coeff, tiles = coeff.contiguous(), tiles.contiguous()
    (m1, n1, rank), (groups, _, bm, bn), capacity = coeff.shape, tiles.shape, len(index.slot)
    values = tiles.new_empty(capacity, bm, bn)
    several, step = _entries_at_a_time(bm * bn)
    if capacity:
        _kernels().blocks_from_factors[(_cells(capacity, several), _cells(bm * bn, step))](
            coeff, tiles, values, index.crow, index.col, index.row, m1, n1, m1 // groups, capacity,
            RANK=rank, AREA=bm * bn, BK=several, BA=step, SUM=_arithmetic(tiles.dtype)["SUM"],
        )  # fmt: skip
    return values


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    dvalues, coeff, tiles = dvalues.contiguous(), coeff.contiguous(), tiles.contiguous()
    (m1, n1, rank), (groups, _, bm, bn), capacity = coeff.shape, tiles.shape, len(index.slot)
    area, arithmetic = bm * bn, _arithmetic(tiles.dtype)
    dcoeff = torch.zeros_like(coeff)
    step = min(256, _padded(area))
    splits = max(1, min(_PROGRAMS // (groups * _cells(area, step)), _cells(capacity, 64 * groups)))
    dtiles = tiles.new_zeros(splits, *tiles.shape, dtype=_sum_dtype(tiles))
    if capacity:
        several, width = _entries_at_a_time(area)
        _kernels().coeff_gradient[(_cells(capacity, several), rank)](
            dvalues, tiles, dcoeff, index.crow, index.col, index.row, m1, n1, m1 // groups,
            RANK=rank, AREA=area, BK=several, BA=width, SUM=arithmetic["SUM"],
        )  # fmt: skip
        _kernels().tiles_gradient[(groups, splits, _cells(area, step))](
            dvalues, coeff, dtiles, index.crow, index.col, index.row, n1, m1 // groups, splits,
            RANK=rank, BR=_padded(rank), AREA=area, BK=32, BA=step, **arithmetic,
        )  # fmt: skip
    return dcoeff, dtiles.sum(0).to(tiles.dtype)
