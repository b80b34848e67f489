"""The backend that always works: plain PyTorch on any device and dtype.

The factored plans are einsums (see `ops/plans`), which cannot skip single dead blocks. Packed products skip them on a CPU
(`by_rows.py`). Elsewhere W is built (`whole.py`), since a product per block row would be launched there, and waited for.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kronblocks.ops.backends import by_rows, whole
from kronblocks.ops.backends.protocol import CALL_SECONDS
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.plans import DENSE, PACKED, Plan
from kronblocks.ops.problem import Problem

name = "torch"
wants_masks = False

_EINSUM_EFFICIENCY = 0.6  # measured on 2 CPU cores, as the next one; nothing was measured on a GPU
_PACKED_EFFICIENCY, _MOST_PACKED = 0.006, 0.8  # per side of a block: one thin product per block row, 0.03 at 4x4, 0.1 at 16x16
_PRODUCT_SECONDS = 2e-5  # to launch one of those thin products
_BUILT = 0.9  # of a dense product's rate where W is built first
_LEAST_DENSITY = 1e-3  # with nothing alive there would be nothing to compute, and no estimate


def serves(device: str, dtype: torch.dtype, *, warn: bool) -> bool:
    """Whether it serves: always."""
    return True


def build() -> str:
    """ "": keys of timings have torch's version anyway."""
    return ""


def efficiency(problem: Problem, plan: Plan) -> float:
    """Rate of a plan as a share of a dense product's, measured on 2 CPU cores."""
    if plan is PACKED and problem.device_type != "cpu":
        return _BUILT * max(problem.density, _LEAST_DENSITY)  # all of W is multiplied
    if plan is PACKED:
        return min(_MOST_PACKED, _PACKED_EFFICIENCY * min(problem.grid.block))
    return _EINSUM_EFFICIENCY


def keeps_on_chip(problem: Problem, plan: Plan) -> bool:
    """Whether intermediates stay on chip: never, since an einsum's result is a tensor."""
    return False


def call_seconds(problem: Problem, plan: Plan) -> float:
    """On a CPU the packed plan launches about a product per block row and column, in training twice as many."""
    if plan is DENSE:
        return 0.0
    if problem.device_type != "cpu":
        return CALL_SECONDS
    products = (2 if problem.training else 1) * sum(problem.grid.shape) if plan is PACKED else 0
    return CALL_SECONDS + products * _PRODUCT_SECONDS


def _by(tensor: Tensor) -> ModuleType:
    """Who multiplies by live blocks on a tensor's device."""
    return by_rows if tensor.is_cpu else whole


def packed_linear(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias; x (rows, n) -> (rows, m)."""
    return _by(x).packed_linear(x, values, index, bias)


def packed_grad_input(dy: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """dx = dy W; dy (rows, m) -> (rows, n)."""
    return _by(dy).packed_grad_input(dy, values, index)


def packed_grad_values(dy: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of dy^T x, (capacity, bm, bn); 0 in slots that the index does not list."""
    return _by(dy).packed_grad_values(dy, x, index)


def kron_linear(x: Tensor, coeff: Tensor, tiles: Tensor, bias: Tensor | None, live: Tensor | None, plan: Plan) -> Tensor:
    """y = x W^T + bias by a factored plan; x (rows, n) -> (rows, m)."""
    coeff = live_only(coeff, live)
    y = plan.second(x, coeff, tiles, plan.first(x, coeff, tiles))
    return y if bias is None else y + bias


def kron_backward(
    dy: Tensor, x: Tensor, coeff: Tensor, tiles: Tensor, live: Tensor | None, plan: Plan, input_grad: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (rows, n) or None, dcoeff, exactly 0 for dead blocks, and dtiles; the intermediate is computed again."""
    coeff = live_only(coeff, live)
    intermediate = plan.first(x, coeff, tiles)
    dx, dcoeff, dtiles = plan.backward(dy.contiguous(), x, coeff, tiles, intermediate, input_grad)
    return dx, live_only(dcoeff, live), dtiles


def live_only(coeff: Tensor, live: Tensor | None) -> Tensor:
    """The coefficients, 0 for dead blocks."""
    return coeff if live is None else coeff.masked_fill(~live.unsqueeze(-1), 0)


def live_blocks(coeff: Tensor, tiles: Tensor, index: BlockIndex) -> Tensor:
    """The live blocks of W in the order of the index's entries, (capacity, bm, bn); the rest is 0."""
    return _by(coeff).live_blocks(coeff, tiles, index)


def live_blocks_backward(dvalues: Tensor, coeff: Tensor, tiles: Tensor, index: BlockIndex) -> tuple[Tensor, Tensor]:
    """dcoeff, exactly 0 for dead blocks, and dtiles."""
    return _by(coeff).live_blocks_backward(dvalues, coeff, tiles, index)
