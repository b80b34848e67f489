"""Estimate the kernels' speed from what they load and the instructions that they compile to. Nothing was measured on a GPU."""

from __future__ import annotations

from kronblocks.ops.backends.protocol import CALL_SECONDS
from kronblocks.ops.backends.triton.packed import fits
from kronblocks.ops.backends.triton.sizes import fit_on_chip
from kronblocks.ops.plans import DENSE, PACKED, Plan
from kronblocks.ops.precision import float32_products
from kronblocks.ops.problem import Problem

# Ceilings relative to a dense product of the same dtype. float32 at full precision is three products on tensor cores here, while
# dense products do not use these at all: so they are above 1. In the others a dense product is on tensor cores too.
_MOST_PACKED_FULL, _MOST_PACKED = 1.5, 0.8
_FACTORED_FULL, _FACTORED = 2.0, 0.6
# Products with blocks wait for the blocks' inputs, of which each number is used as often as a block is high: the smaller side at
# which one ceiling after the other would be 1.
_FULL_SIDE, _SIDE = 32, 150
_TILE_SIDE = 4  # tiles with a smaller side reach as much less of their ceiling
_BUILT = 0.9  # of a dense product's rate where W is built first
_TOGETHER = 16  # outputs that a program takes together at least, with all inputs that any of them is alive with
_LEAST_DENSITY = 1e-3  # with nothing alive there would be nothing to compute, and no estimate
_LAUNCHES_SECONDS = 1e-5  # of what a factored plan launches beyond building W and multiplying


def efficiency(problem: Problem, plan: Plan) -> float:
    """Share of a dense product's rate."""
    full_precision = problem.dtype.itemsize > 2 and float32_products() == "ieee"
    smallest, density = min(problem.grid.block), max(problem.density, _LEAST_DENSITY)
    if plan is PACKED:
        if not fits(*problem.grid.block):
            return _BUILT * density  # all of W is multiplied
        return min(_MOST_PACKED_FULL, smallest / _FULL_SIDE) if full_precision else min(_MOST_PACKED, smallest / _SIDE)
    taken = 1 - (1 - density) ** _TOGETHER  # of inputs, if blocks died at random
    return (_FACTORED_FULL if full_precision else _FACTORED) * min(1.0, smallest / _TILE_SIDE) * density / taken


def keeps_on_chip(problem: Problem, plan: Plan) -> bool:
    """Factored plans do, of tiles that fit there."""
    return plan.is_factored and fit_on_chip(problem.grid.block)


def call_seconds(problem: Problem, plan: Plan) -> float:
    """One call of an operator of ours, which builds W too; several launches in a factored plan."""
    if plan is DENSE and problem.rank is None:
        return 0.0
    return CALL_SECONDS + (_LAUNCHES_SECONDS if plan.is_factored else 0.0)
