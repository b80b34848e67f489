"""Plan: the properties of a plan, independent of the backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from kronblocks.ops.problem import ProductSizes


class Stages(NamedTuple):
    """The counts of a plan for y = x W^T, without dead blocks (equation 9 in docs/math.md)."""

    first: int  # multiply-adds of each stage
    second: int
    between: int  # values of the intermediate


def _of_operators(*_: Any) -> Any:
    raise AssertionError("this plan has separate operators, see `ops/packed.py`")


@dataclass(frozen=True, eq=False)
class Plan:
    """A way of computing y = x W^T.

    Users write its name, and files store it; `plan_named` looks it up.

    Args:
        name: "dense", "tile_first", "coeff_first" or "packed".
        is_factored: it multiplies by factors, never by blocks of W. Layers of free values cannot use it, and its intermediate
            grows with the rows of x.
        needs_live: it multiplies by live blocks only, so it needs the mask or index.
        keeps_blocks: it keeps the blocks that it builds from factors until backward.
        stages: counts one forward.
        backward_macs: counts one backward, from the stages and whether dx is wanted.
        first: the first stage in plain PyTorch; this and the next two as in `kronblocks.ops.plans`.
        second: the second stage.
        backward: all gradients.
    """

    name: str
    is_factored: bool
    needs_live: bool
    keeps_blocks: bool
    stages: Callable[[ProductSizes], Stages]
    backward_macs: Callable[[Stages, bool], int]
    first: Callable[[Tensor, Tensor, Tensor], Tensor] = _of_operators
    second: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = _of_operators
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor | None, Tensor, Tensor]] = _of_operators

    def __repr__(self) -> str:
        return f"Plan({self.name!r})"


def factored_backward_macs(stages: Stages, input_grad: bool) -> int:
    """The first stage again; two gradients of the second stage's size; dtiles or dcoeff, and dx, of the first's."""
    return 2 * stages.second + stages.first * (2 + input_grad)
