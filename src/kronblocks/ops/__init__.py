"""Operators on tensors: Kronecker and block-sparse products, and their costs. There are no modules and no state here."""

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.ops.costs.choice import PlanChoice, choose_plan
from kronblocks.ops.costs.counts import Cost, cost
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.kron import block_norms, kron_linear, kron_weight
from kronblocks.ops.nearest import canonical_form, nearest_kronecker_sum
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.packed_int8 import packed_linear_int8
from kronblocks.ops.problem import Problem

__all__ = [
    "BlockGrid",
    "BlockIndex",
    "BlockSize",
    "Cost",
    "PlanChoice",
    "Problem",
    "block_norms",
    "canonical_form",
    "choose_plan",
    "cost",
    "kron_linear",
    "kron_weight",
    "nearest_kronecker_sum",
    "packed_linear",
    "packed_linear_int8",
]
