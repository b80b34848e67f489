"""What an algorithm asks of a layer that has blocks: the one statement of it."""

from __future__ import annotations

import inspect
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid
from kronblocks.ops.problem import Problem


class HasBlocks(Protocol):
    """What a layer must offer to be the target of an algorithm.

    The layers of `kronblocks.nn` do, `MaskedLinear` does it for a plain nn.Linear, and so may a layer of your own.
    """

    @property
    def grid(self) -> BlockGrid:
        """How the weight is cut into blocks."""
        ...

    @property
    def block_mask(self) -> Tensor:
        """(m1, n1) bool, True = live."""
        ...

    def block_norms(self) -> Tensor:
        """Frobenius norm of every block, (m1, n1)."""
        ...

    def nonzero_blocks(self) -> Tensor:
        """Which blocks of the weight itself, whatever the mask says, hold a value other than exactly 0, (m1, n1) bool."""
        ...

    def block_inner_products(self) -> Tensor:
        """<dW, W> of every block, (m1, n1), from the gradients that the parameters hold; what dead blocks have does not count."""
        ...

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks, the bias not among them."""
        ...

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Where the parameters hold some blocks, (m1, n1) bool, and no others: `parameter[where]` for each pair."""
        ...

    def set_block_mask_(self, mask: Tensor) -> None:
        """Make exactly these blocks, (m1, n1) bool, live; those that come alive start at zero."""
        ...

    def scale_blocks_(self, multipliers: Tensor) -> None:
        """Multiply every block by its number, (m1, n1); `set_block_mask_` follows where blocks die."""
        ...

    def enforce_zeros_(self) -> None:
        """Put dead blocks back to exactly 0, after an optimiser step may have moved them."""
        ...


class HasPlans(Protocol):
    """What a layer offers beside that, if plans are to be chosen for it."""

    plan: str  # "auto", or the one that the user wants
    active_plan: str  # the one that it computes with
    rows: int

    def use_plan_(self, plan: str) -> None:
        """Compute with this plan from now on."""
        ...

    def keep_index_size_(self) -> None:
        """Deaths are not to change the sizes that compiled code knows."""
        ...

    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem:
        """The layer as the cost model sees it, at its present density."""
        ...


def has_blocks(module: object) -> TypeGuard[HasBlocks]:
    """Whether a module knows its own blocks."""
    return _offers(module, HasBlocks)


def has_plans(layer: object) -> TypeGuard[HasPlans]:
    """Whether plans may be chosen for a layer."""
    return _offers(layer, HasPlans)


def _offers(thing: object, protocol: type) -> bool:
    names = {*vars(protocol), *inspect.get_annotations(protocol)}
    # not isinstance: from Python 3.12 on it looks past __getattr__, and so finds no buffer of a module
    return all(hasattr(thing, name) for name in names if not name.startswith("_"))
