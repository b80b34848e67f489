"""Products with live blocks. Blocks with sides from 16 to 128 use tensor cores; for others W is built, and cuBLAS multiplies."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from kronblocks.ops.backends.triton import tuning
from kronblocks.ops.backends.triton.launch import PROGRAMS, arithmetic, cells, launch, padded, sum_dtype
from kronblocks.ops.backends.triton.sizes import ENOUGH, room
from kronblocks.ops.backends.triton.tuning import Sizes
from kronblocks.ops.backends.triton.weights import gather, scatter
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.precision import float32_products

SMALLEST, _LARGEST = 16, 128  # sides of a block that tensor cores take whole
_SPLIT_ROWS = 1024  # of a sum over rows, at least, for one program
_BLOCK_ROWS = 1024  # of which a program looks for its own at a time


def fits(height: int, width: int) -> bool:
    """Whether blocks are multiplied as they are; of others W is built."""
    return min(height, width) >= SMALLEST and max(height, width) <= _LARGEST


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    if not fits(*values.shape[1:]):
        return linear(x, scatter(values, index), bias)
    return _product(x, values, bias, index, transposed=False)


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    if not fits(*values.shape[1:]):
        return dy @ scatter(values, index)
    return _product(dy, values, None, index, transposed=True)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, *, transposed: bool) -> Tensor:
    from kronblocks.ops.backends.triton import packed_kernels as kernels

    x, values, bias = x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
    _, bm, bn = values.shape
    height, width, columns = (bn, bm, index.grid[1]) if transposed else (bm, bn, index.grid[0])
    starts, source = (index.ccol, index.row) if transposed else (index.crow, index.col)
    rows = x.shape[0]

    def run(sizes: Sizes) -> Tensor:
        y, take, capacity = x.new_empty(rows, columns * height), sizes.terms, len(index.slot)
        places = columns + capacity // take if take else columns  # at least as many as there are pieces
        parts = x.new_empty(places, rows, padded(height), dtype=sum_dtype(x)) if take else None
        known: dict[str, Any] = {"H": height, "BH": padded(height), "BT": sizes.rows, "BP": min(_BLOCK_ROWS, padded(columns))}
        known |= {"TAKE": take, "HAS_BIAS": bias is not None, "num_warps": sizes.warps}
        launch(
            kernels.product, (places * cells(rows, sizes.rows),),
            x, values, bias, y, parts, starts, source, index.slot, index.order, rows, columns, places, x.shape[1], y.shape[1],
            W=width, BW=sizes.sources, TRANSPOSED=transposed, num_stages=sizes.stages, **known, **arithmetic(x.dtype),
        )  # fmt: skip
        if parts is not None:
            launch(kernels.join, (columns, cells(rows, sizes.rows)), parts, bias, y, starts, rows, y.shape[1], **known)
        return y

    default = _product_sizes(rows, columns, padded(height), padded(width, 16), x.element_size())
    few = columns * cells(rows, default.rows) < 4 * PROGRAMS
    cuts = [2 * cells(len(index.slot), columns)] if few and len(index.slot) else []
    return _launched(f"product{', transposed' * transposed}", default, x, (bm, bn), index, run, cuts)


def _product_sizes(rows: int, columns: int, height: int, width: int, bytes_of_a_value: int) -> Sizes:
    """Rows that one program multiplies, as many as leave a GPU enough programs: each block is loaded once for all of them.

    The chunk of a block is as much as fits the shared memory of any GPU, three deep. A program takes all entries of a block row:
    programs of many rows average out, and where few are launched tuning tries to cut long block rows into pieces.
    """
    steps = {256: 4 * PROGRAMS, 128: PROGRAMS, 64: PROGRAMS} if bytes_of_a_value == 2 else {64: PROGRAMS}
    fitting = (step for step, enough in steps.items() if step * height <= 2**14 and columns * cells(rows, step) >= enough)
    step = next(fitting, 32)
    chunk = min(32 if bytes_of_a_value > 2 else 64, width)
    return Sizes(height, step, chunk, warps=8 if step * height > 128 * 64 else 4, stages=3, terms=0)


def _launched(
    kernel: str,
    default: Sizes,
    x: Tensor,
    block: tuple[int, int],
    index: BlockIndex,
    run: Callable[[Sizes], Tensor],
    terms: Sequence[int],
) -> Tensor:
    """Run a launch, with the quickest sizes where tuning is asked for, also those with so many entries for a program."""
    about: dict[str, Any] = {
        "grid": index.grid,
        "block": block,
        "capacity": len(index.slot),
        "dtype": str(x.dtype),
        "precision": float32_products(),
    }
    return tuning.chosen(kernel, about, x, default, _others(default, terms), run)


def _others(default: Sizes, terms: Sequence[int]) -> Iterator[Sizes]:
    """What else to try: other numbers of rows or entries, or other warps and loads ahead."""
    sizes = [replace(default, rows=rows) for rows in (32, 64, 128, 256)]
    sizes += [replace(default, terms=taken) for taken in terms if taken]
    sizes += [replace(default, warps=warps, stages=stages) for warps, stages in itertools.product((4, 8), (2, 3, 4, 5))]
    yield from (other for other in dict.fromkeys(sizes) if other != default)


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    from kronblocks.ops.backends.triton import packed_kernels as kernels

    (m1, n1), rows, capacity = index.grid, x.shape[0], len(index.slot)
    height, width = dy.shape[1] // m1, x.shape[1] // n1
    if not fits(height, width):
        return gather(dy.t() @ x, index, height, width)
    dy, x = dy.contiguous(), x.contiguous()
    default = _grad_values_sizes(capacity, m1, padded(height), padded(width), x.element_size())

    def run(sizes: Sizes) -> Tensor:
        programs = (capacity + (sizes.terms - 1) * min(m1, capacity)) // sizes.terms  # if each row's last one has but an entry
        splits = max(1, min(cells(ENOUGH, max(1, cells(capacity, sizes.terms))), cells(rows, _SPLIT_ROWS)))
        share = cells(cells(rows, splits), 256) * 256 if splits > 1 else rows
        shape = (capacity, height, width)
        out = dy.new_zeros(shape) if splits == 1 else dy.new_zeros(splits, *shape, dtype=sum_dtype(dy))
        launch(
            kernels.grad_values, (programs, splits if rows else 0),
            dy, x, out, index.crow, index.col, index.slot, rows, m1, dy.shape[1], x.shape[1], share, capacity * height * width,
            H=height, W=width, BH=padded(height), BW=padded(width), BT=sizes.rows, TERMS=sizes.terms,
            BP=min(_BLOCK_ROWS, padded(m1)), num_warps=sizes.warps, num_stages=sizes.stages, **arithmetic(x.dtype),
        )  # fmt: skip
        return out if splits == 1 else out.sum(0).to(dy.dtype)

    return _launched("grad_values", default, x, (height, width), index, run, (default.terms // 2, default.terms // 4))


def _grad_values_sizes(capacity: int, block_rows: int, height: int, width: int, bytes_of_a_value: int) -> Sizes:
    """Several entries of a block row for one program, which then share its dy, but no more than a row has."""
    terms = max(1, min(room(bytes_of_a_value == 2) // (height * width), 256 // width, padded(cells(capacity, block_rows))))
    warps, rows = 8 if terms * width >= 128 else 4, 64 if bytes_of_a_value == 2 else 32
    return Sizes(height, rows, width, warps, stages=3, terms=terms)
