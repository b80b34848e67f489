"""The C++ kernels for CPUs (src/native): float64, float32, bfloat16 and float16, with as many threads as torch has.

The library registers them with torch's dispatcher, which calls them for tensors on the CPU: the functions here are names for
that. Dead blocks are skipped; intermediates stay in cache; results are the same from run to run for the same number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronblocks.ops.backends import library
from kronblocks.ops.backends.protocol import CALL_SECONDS
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import COEFF_FIRST, DENSE, PACKED, TILE_FIRST, Plan
from kronblocks.ops.problem import Problem

name = "native"
wants_masks = True  # they scan it at every call; what they would gain without has not been measured

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_FULL_EFFICIENCY = {PACKED: 1.0, COEFF_FIRST: 0.8, TILE_FIRST: 0.6}  # measured on 2 CPU cores
_WIDENED = 0.45  # what is computed with in float32, beside a dense product of 16-bit numbers in half the time
_CONVOLVED = 0.6  # packed blocks beside a dense convolution
_LANES, _FEW_ROWS = 16, 4  # the packed kernels' vectors hold so many rows of x; kernels of their own take very few rows

_operators = torch.ops.kronblocks


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """CPUs, where the library is there."""
    if device != "cpu" or dtype not in DTYPES:
        return False
    return library.load() is not None if warn else library.unavailable_reason() is None


def efficiency(problem: Problem, plan: Plan) -> float:
    """Share of a dense product's rate, less where rows do not fill the packed kernels' vectors."""
    narrow = problem.dtype in (torch.bfloat16, torch.float16)
    convolved = plan is PACKED and problem.convolution is not None
    widened = narrow and (plan is TILE_FIRST or convolved or problem.dtype is torch.float16)
    full = _FULL_EFFICIENCY[plan] * (_WIDENED if widened else 1.0) * (_CONVOLVED if convolved else 1.0)
    if plan is not PACKED or (problem.rows <= _FEW_ROWS and not problem.training):
        return full
    return full * min(1.0, max(1, problem.rows) / _LANES)


def keeps_on_chip(problem: Problem, plan: Plan) -> bool:
    """Factored plans take so few rows at a time that the intermediate stays in cache."""
    return plan.is_factored


def call_seconds(problem: Problem, plan: Plan) -> float:
    """One call of an operator of ours."""
    return 0.0 if plan is DENSE else CALL_SECONDS


def build() -> str:
    """Which kernels are loaded: the instruction set, and size and time of the library's file."""
    loaded = loaded_library()
    file = loaded.path.stat()
    return f"{loaded.instruction_set()} {file.st_size} {file.st_mtime_ns}"


def checks(x: Tensor, weight: Tensor, bias: Tensor | None, where: Tensor) -> bool:
    """Whether these operands go to kernels that look by themselves whether they fit together, as they are."""
    return (
        x.is_cpu
        and weight.is_cpu
        and where.is_cpu
        and (bias is None or bias.is_cpu)
        and library.is_loaded()
        and not torch.is_autocast_enabled("cpu")
    )


def loaded_library() -> library.Library:
    """The library, where `serves` has said that it is there."""
    loaded = library.load()
    assert loaded is not None, "asked for without serves()"
    return loaded


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    return _operators.packed_linear.default(x, values, bias, *index)


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    return _operators.packed_grad_input.default(dy, values, *index)


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    return _operators.packed_grad_values.default(dy, x, *index)


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """y = x W^T + bias by a factored plan; x (rows, n) -> (rows, m)."""
    return _operators.kron_linear.default(x, coeff, tiles, bias, live, plan.name)


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles."""
    dx, dcoeff, dtiles = _operators.kron_backward.default(dy, x, coeff, tiles, live, plan.name, input_grad)
    return dx if input_grad else None, dcoeff, dtiles


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the entries, (capacity, bm, bn); 0 behind them."""
    return _operators.live_blocks.default(coeff, tiles, *index)


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    return _operators.live_blocks_backward.default(dvalues, coeff, tiles, *index)
