"""The methods there are, what they have in common, and what each does where the user sets nothing."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from kronblocks.sparsity.rules.base import Form
from kronblocks.sparsity.schedule import Shape
from kronblocks.sparsity.targets import Score

Init = Literal["random", "spectral", "nearest"]
TileGroups = int | Literal["per-row"]
Method = Literal[
    "two-phase",
    "kron-l1",
    "group-lasso",
    "elastic-group-lasso",
    "rigl",
    "iterative",
    "magnitude",
    "static",
    "dense",
]

FACTORED: frozenset[str] = frozenset({"two-phase", "kron-l1"})
"""Methods that replace nn.Linear by a Kronecker layer; the others work on the nn.Linear itself."""

LIFTED: frozenset[str] = frozenset({"two-phase"})
"""Methods that lift factors to free values."""

PENALISED: frozenset[str] = frozenset({"kron-l1", "group-lasso", "elastic-group-lasso"})
"""Methods that have a penalty."""

CONSTANT: frozenset[str] = frozenset({"rigl", "static"})
"""Methods that have the target sparsity from the first step."""

STORED: frozenset[str] = CONSTANT | {"magnitude", "iterative"}
"""Methods of free values that can work on the nn.Linear itself or on live blocks only."""

PRUNING: frozenset[str] = frozenset({"two-phase", "magnitude", "iterative"})
"""Methods that kill the blocks of least score at each mask update."""

REGROWING: frozenset[str] = PRUNING | {"rigl"}
"""Methods that can bring dead blocks back."""


class Own(NamedTuple):
    """What a method does where the user sets nothing."""

    end: float = 0.5  # of pruning, as a share of the training
    shape: Shape = "cubic"
    form: Form = "proximal"  # of the penalty
    tile_groups: TileGroups = "per-row"
    init: Init = "random"
    gate: bool = False
    score: Score = "norm"
    regrow: float = 0.0


OWN: dict[str, Own] = {
    "two-phase": Own(end=0.4),
    "kron-l1": Own(end=0.8, form="gradient", tile_groups=1, init="spectral", gate=True, score="gate"),
    "rigl": Own(end=0.75, regrow=0.3),
    "iterative": Own(shape="staircase"),
}
"""Of the methods that differ from `Own()`."""


def own_rank(area: int) -> int:
    """Kronecker terms for blocks of this many weights, where the user sets none: a quarter of them, from 2 to 8.

    Measured (docs/experiments.md): at 16x16 trials choose 8 rather than 4. At 4x4 they do too, by 0.1 to 1.1 points of validation
    accuracy in one or two seeds; with all else as by default five seeds are level, and 8 has twice the factors.

    >>> own_rank(4), own_rank(16), own_rank(256)
    (2, 4, 8)
    """
    return min(area, max(2, min(8, area // 4)))


REVISIONS: dict[str, int] = {
    **dict.fromkeys(get_args(Method), 2),
    "dense": 1,
    "rigl": 3,
    **dict.fromkeys(("group-lasso", "elastic-group-lasso"), 4),
}
"""Of each method; raise it when a change alters what trainings come to: experiments run again what is of an earlier one."""
