"""Ways of computing y = x W^T. Each module counts its plan, and has the same three functions in plain PyTorch ("packed" has
operators instead):

- `first(x, coeff, tiles)`: the intermediate of the plan's first stage;
- `second(x, coeff, tiles, intermediate)`: y, (rows, m), from it;
- `backward(dy, x, coeff, tiles, intermediate, input_grad)`: (dx or None, dcoeff, dtiles), equation 8 in docs/math.md.

x is (rows, n), coeff (m1, n1, r), tiles (g, r, bm, bn). In the einsums: t row, g group, p block row (within its group where g is
there too), q block column, i rank, a and b row and column inside a block.
"""

from __future__ import annotations

from kronblocks.core.errors import KronblocksError
from kronblocks.ops.plans.coeff_first import COEFF_FIRST
from kronblocks.ops.plans.dense import DENSE
from kronblocks.ops.plans.packed import PACKED
from kronblocks.ops.plans.plan import Plan, Stages
from kronblocks.ops.plans.tile_first import TILE_FIRST

__all__ = [
    "COEFF_FIRST",
    "DENSE",
    "PACKED",
    "PLANS",
    "PLAN_NAMES",
    "TILE_FIRST",
    "Plan",
    "Stages",
    "check_plan",
    "plan_named",
    "possible_plans",
]

PLANS = {plan.name: plan for plan in (DENSE, TILE_FIRST, COEFF_FIRST, PACKED)}
PLAN_NAMES = tuple(PLANS)
_OF_VALUES = tuple(plan.name for plan in PLANS.values() if not plan.is_factored)


def possible_plans(rank: int | None) -> tuple[str, ...]:
    """The plans that can compute a layer: all four on factors, dense and packed on free block values (rank None)."""
    return PLAN_NAMES if rank is not None else _OF_VALUES


def plan_named(name: str, rank: int | None) -> Plan:
    """The plan of this name, for a layer of this rank.

    Raises:
        KronblocksError: the name is unknown, or the plan works on factors and the layer has free block values (rank None).

    >>> plan_named("tile_first", 2).is_factored
    True
    """
    if name not in possible_plans(rank):
        raise _refused(name, possible_plans(rank))
    return PLANS[name]


def check_plan(plan: str, rank: int | None) -> None:
    """Refuse what a layer's `plan` cannot be: it may also be "auto".

    Raises:
        KronblocksError: as `plan_named`.
    """
    if plan != "auto" and plan not in possible_plans(rank):
        raise _refused(plan, ("auto", *possible_plans(rank)))


def _refused(plan: str, allowed: tuple[str, ...]) -> KronblocksError:
    reason = "works on factors, not on free block values" if plan in PLANS else "is unknown"
    return KronblocksError(f"plan {plan!r} {reason}: write one of {', '.join(allowed)}")
