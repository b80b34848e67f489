"""Multiply by live blocks only (equation 7): d(1 + r/T) of dense's multiply-adds, with density d. Factors are expanded first.

Its stages are separate operators: `live_blocks` in `ops/factored.py`, `packed_linear` in `ops/packed.py`.
"""

from __future__ import annotations

from kronblocks.ops.plans.plan import Plan, Stages
from kronblocks.ops.problem import ProductSizes


def stages(sizes: ProductSizes) -> Stages:
    """Count: build the live blocks, if there are factors, then one product with them."""
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
