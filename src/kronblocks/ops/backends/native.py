"""The C++ kernels for CPUs (src/native), called through ctypes: float32, float64 and bfloat16, with torch's number of threads.

Every function takes contiguous tensors or makes them so. Dead blocks are skipped; intermediates stay in cache; results are the
same from run to run for the same number of threads. Factors in bfloat16 go to PyTorch's own operators.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure, byref, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from kronblocks.ops.backends import library
from kronblocks.ops.backends import torch as plain
from kronblocks.ops.backends.protocol import CALL_SECONDS
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import COEFF_FIRST, DENSE, PACKED, TILE_FIRST, Plan, dense
from kronblocks.ops.problem import Problem

name = "native"
wants_masks = True  # they scan it at every call; what they would gain without has not been measured

_FULL_EFFICIENCY = {PACKED: 1.0, COEFF_FIRST: 0.8, TILE_FIRST: 0.6}  # measured on 2 CPU cores
_LANES, _FEW_ROWS = 16, 4  # the packed kernels' vectors hold so many rows of x; kernels of their own take very few rows

_SUFFIX = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


class _PackedIndex(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("crow", "col", "row", "slot", "ccol", "order")),
        *((name, c_int64) for name in ("m1", "n1", "bm", "bn")),
    ]


class _KronShape(Structure):
    _fields_ = [(name, c_int64) for name in ("m1", "n1", "bm", "bn", "rank", "groups")]


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """CPUs, where the library is there."""
    if device != "cpu" or dtype not in _SUFFIX:
        return False
    return library.load() is not None if warn else library.unavailable_reason() is None


def efficiency(problem: Problem, plan: Plan) -> float:
    """Share of a dense product's rate, less where rows do not fill the packed kernels' vectors."""
    full = _FULL_EFFICIENCY[plan]
    if plan is not PACKED or (problem.rows <= _FEW_ROWS and not problem.training):
        return full
    return full * min(1.0, max(1, problem.rows) / _LANES)


def keeps_on_chip(problem: Problem, plan: Plan) -> bool:
    """Factored plans take so few rows at a time that the intermediate stays in cache."""
    return plan.is_factored and problem.dtype is not torch.bfloat16


def call_seconds(problem: Problem, plan: Plan) -> float:
    """One call of an operator of ours."""
    return 0.0 if plan is DENSE else CALL_SECONDS


def instruction_set() -> str:
    """ "baseline", "avx2", "avx512" or "avx512bf16": what the loaded kernels are compiled for."""
    kernels = _kernels()
    kernels.kb_isa.restype = ctypes.c_char_p
    return kernels.kb_isa().decode()


def build() -> str:
    """Which kernels are loaded: the instruction set, and size and time of the library's file."""
    file = Path(_kernels()._name).stat()
    return f"{instruction_set()} {file.st_size} {file.st_mtime_ns}"


def use_instruction_set(name: str) -> bool:
    """Use the kernels compiled for an instruction set that `instruction_set` may name; False if there are none here."""
    return bool(_kernels().kb_use_isa(name.encode()))


def _kernels() -> ctypes.CDLL:
    kernels = library.load()
    assert kernels is not None, "asked for without serves()"
    return kernels


def _call(name: str, dtype: torch.dtype, *arguments) -> None:
    """Tensors become pointers, None a null pointer, whole numbers 64 bits; the number of threads comes last."""

    def converted(argument):
        if argument is None or isinstance(argument, Tensor):
            return c_void_p(None if argument is None else argument.data_ptr())
        return c_int64(argument) if isinstance(argument, int) else argument

    function = getattr(_kernels(), f"kb_{name}_{_SUFFIX[dtype]}")
    function.restype = None
    function(*map(converted, arguments), c_int(torch.get_num_threads()))


def _index(index: BlockIndex, block: torch.Size) -> tuple[object, tuple[Tensor, ...]]:
    """The index as the kernels read it, and the tensors that must live as long."""
    tensors = tuple(t.contiguous() for t in index)
    pointers = {name: t.data_ptr() for name, t in zip(index._fields, tensors, strict=True)}
    m1, n1 = index.grid
    return byref(_PackedIndex(**pointers, m1=m1, n1=n1, bm=block[0], bn=block[1])), tensors


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    x, values, bias = x.contiguous(), values.contiguous(), None if bias is None else bias.contiguous()
    where, _alive = _index(index, values.shape[1:])
    y = x.new_empty(x.shape[0], index.grid[0] * values.shape[1])
    _call("packed_linear", x.dtype, where, x, x.shape[0], values, bias, y)
    return y


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    dy, values = dy.contiguous(), values.contiguous()
    where, _alive = _index(index, values.shape[1:])
    dx = dy.new_empty(dy.shape[0], index.grid[1] * values.shape[2])
    _call("packed_grad_input", dy.dtype, where, dy, dy.shape[0], values, dx)
    return dx


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    dy, x = dy.contiguous(), x.contiguous()
    block = torch.Size((dy.shape[1] // index.grid[0], x.shape[1] // index.grid[1]))
    where, _alive = _index(index, block)
    dvalues = dy.new_empty(len(index.slot), *block)
    _call("packed_grad_values", dy.dtype, where, dy, x, x.shape[0], dvalues, len(index.slot))
    return dvalues


def _shape(coeff: Tensor, tiles: Tensor) -> object:
    (m1, n1, rank), (groups, _, bm, bn) = coeff.shape, tiles.shape
    return byref(_KronShape(m1, n1, bm, bn, rank, groups))


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """y = x W^T + bias by a factored plan; x (rows, n) -> (rows, m)."""
    if coeff.dtype is torch.bfloat16:
        return plain.kron_linear(x, coeff, tiles, bias, live, plan)
    if plan is DENSE:
        weight = dense.first(None, coeff if live is None else coeff * live.unsqueeze(-1), tiles)
        return torch.nn.functional.linear(x, weight, bias)
    x, coeff, tiles = x.contiguous(), coeff.contiguous(), tiles.contiguous()
    live, bias = None if live is None else live.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(x.shape[0], coeff.shape[0] * tiles.shape[2])
    first = c_int(plan is TILE_FIRST)
    _call("kron_linear", x.dtype, _shape(coeff, tiles), first, x, x.shape[0], coeff, tiles, live, bias, y)
    return y


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles."""
    if plan is DENSE or coeff.dtype is torch.bfloat16:
        return plain.kron_backward(dy, x, coeff, tiles, live, plan, input_grad)
    dy, x, coeff, tiles = dy.contiguous(), x.contiguous(), coeff.contiguous(), tiles.contiguous()
    live = None if live is None else live.contiguous()
    dx = x.new_empty(x.shape) if input_grad else None
    dcoeff, dtiles = torch.empty_like(coeff), torch.empty_like(tiles)
    first = c_int(plan is TILE_FIRST)
    _call(
        "kron_backward", x.dtype, _shape(coeff, tiles), first, dy, x, x.shape[0], coeff, tiles, live, dx, dcoeff, dtiles
    )  # fmt: skip
    return dx, dcoeff, dtiles


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the entries, (capacity, bm, bn); 0 behind them."""
    if coeff.dtype is torch.bfloat16:
        return plain.live_blocks(coeff, tiles, index)
    coeff, tiles = coeff.contiguous(), tiles.contiguous()
    where, _alive = _index(index, tiles.shape[2:])
    values = tiles.new_empty(len(index.slot), *tiles.shape[2:])
    _call("live_blocks", tiles.dtype, where, _shape(coeff, tiles), coeff, tiles, values, len(index.slot))
    return values


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    if coeff.dtype is torch.bfloat16:
        return plain.live_blocks_backward(dvalues, coeff, tiles, index)
    dvalues, coeff, tiles = dvalues.contiguous(), coeff.contiguous(), tiles.contiguous()
    where, _alive = _index(index, tiles.shape[2:])
    dcoeff, dtiles = torch.empty_like(coeff), torch.empty_like(tiles)
    _call("live_blocks_backward", tiles.dtype, where, _shape(coeff, tiles), dvalues, coeff, tiles, dcoeff, dtiles)
    return dcoeff, dtiles
