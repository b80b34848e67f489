"""HasBlocks and HasPlans: what an algorithm needs from a layer with blocks."""

from __future__ import annotations

import inspect
from typing import Protocol, TypeGuard

from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid
from kronblocks.ops.problem import Problem


class HasBlocks(Protocol):
    """The methods of a layer that algorithms can prune.

    The layers of `kronblocks.nn` have them, `MaskedLinear` has them for a plain nn.Linear, and a layer of yours may, too.
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
        """Which blocks of the weight hold a value other than exactly 0, whatever the mask says: (m1, n1) bool."""
        ...

    def block_inner_products(self) -> Tensor:
        """<dW, W> of every block, (m1, n1), from the parameters' present gradients. Entries of dead blocks are ignored."""
        ...

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks, without the bias."""
        ...

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a parameter and an index: `parameter[index]` holds these blocks, (m1, n1) bool, and no others."""
        ...

    def set_block_mask_(self, mask: Tensor) -> None:
        """Make exactly these blocks, (m1, n1) bool, live. Blocks that come alive start at zero."""
        ...

    def scale_blocks_(self, multipliers: Tensor) -> None:
        """Multiply every block by its number in an (m1, n1) grid. `set_block_mask_` follows if blocks die."""
        ...

    def enforce_zeros_(self) -> None:
        """Set dead blocks to exactly 0, since an optimiser step may have moved them."""
        ...


class HasPlans(Protocol):
    """The further methods of a layer for which plans can be chosen."""

    plan: str  # "auto", or the user's choice
    active_plan: str  # the plan that the layer computes with
    rows: int

    def use_plan_(self, plan: str) -> None:
        """Compute with this plan from now on."""
        ...

    def keep_index_size_(self) -> None:
        """From now on, keep the sizes that compiled code relies on when blocks die."""
        ...

    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem:
        """The layer's product for the cost model, at its present density."""
        ...


def has_blocks(module: object) -> TypeGuard[HasBlocks]:
    """Whether a module has the methods of `HasBlocks`."""
    return _offers(module, HasBlocks)


def has_plans(layer: object) -> TypeGuard[HasPlans]:
    """Whether a layer has the methods of `HasPlans`."""
    return _offers(layer, HasPlans)


def _offers(thing: object, protocol: type) -> bool:
    names = {*vars(protocol), *inspect.get_annotations(protocol)}
    # not isinstance: from Python 3.12 on it does not call __getattr__, and so finds no buffer of a module
    return all(hasattr(thing, name) for name in names if not name.startswith("_"))
