"""Live blocks only (equation 7): multiply-adds d(1 + r/T) of dense, d the density. On factors the live blocks are built first.

Its stages are operators of their own: `live_blocks` in `ops/factored.py`, `packed_linear` in `ops/packed.py`.
"""

from __future__ import annotations

from kronblocks.ops.plans.plan import Plan, Stages
from kronblocks.ops.problem import ProductSizes


def stages(sizes: ProductSizes) -> Stages:
    """Build the live blocks, where there are factors; one product with them."""
    weights = sizes.live * sizes.bm * sizes.bn
    return Stages(sizes.rank * weights, sizes.rows * weights, weights if sizes.rank else 0)


def backward_macs(stages: Stages, input_grad: bool) -> int:
    """The gradient of the blocks is one product of the second stage's size, dx another; then dcoeff and dtiles."""
    return stages.second * (1 + input_grad) + 2 * stages.first


PACKED = Plan(
    "packed",
    is_factored=False,
    needs_live=True,
    keeps_blocks=True,
    stages=stages,
    backward_macs=backward_macs,
)
