"""What the two block-sparse layers share: a grid, a mask, a plan and the index that the packed plan needs."""

from __future__ import annotations

from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import KronblocksError
from kronblocks.core.shards import is_sharded
from kronblocks.nn.built import is_transformed, weight_of
from kronblocks.nn.loading import WholeWeights
from kronblocks.ops.costs.choice import PlanChoice, choose_plan
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.pattern import Pattern
from kronblocks.ops.plans import PLANS, check_plan
from kronblocks.ops.problem import ASSUMED_ROWS, Problem


class BlockLayer(WholeWeights):
    """Base of `KroneckerBlockLinear` and `BlockSparseLinear`. Subclasses store the blocks and compute with them.

    What a layer computes follows from its parameters and buffers alone. What is derived from the buffers (an index of the live
    blocks) is in `_pattern`, which `_follow` brings up to date whenever somebody has written into them or replaced them.
    """

    kind: str  # the class's name, also where fully_shard has made a class of its own
    block_mask: Tensor  # (m1, n1) bool, True = live

    def __init__(self, grid: BlockGrid, rank: int | None, tile_groups: int, plan: str, device) -> None:
        super().__init__()
        check_plan(plan, rank)
        self.grid = grid
        self.in_features, self.out_features = grid.in_features, grid.out_features
        self.rank, self.tile_groups = rank, tile_groups
        self.plan = plan
        self.rows = ASSUMED_ROWS
        self._pattern = Pattern()  # no buffers: compiled code takes sizes of buffers for fixed, and an index's change
        self.register_buffer("block_mask", torch.ones(grid.shape, dtype=torch.bool, device=device))
        self.register_state_dict_pre_hook(_before_state_dict)
        self.register_load_state_dict_post_hook(_after_load)

    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem:
        """This layer as the cost model sees it, at its present density."""
        weight = next(self.parameters(recurse=False))
        density = 1.0 if self.block_mask.is_meta else self.density
        rows, device = rows or self.rows, weight.device.type
        gate = getattr(self, "gate", None) is not None
        return Problem(self.grid, self.rank, self.tile_groups, rows, density, weight.dtype, device, training, input_grad, gate)

    def choose_plan_(self, rows: int | None = None, *, measure: bool = False) -> PlanChoice:
        """Choose the plan again where the user wrote "auto", for the present density and this many rows of x.

        Args:
            rows: rows of x from now on; None: as before.
            measure: choose by timings of this machine instead of counts.
        """
        self.rows = rows or self.rows
        choice = choose_plan(self.problem(), measure=measure)
        self.use_plan_(choice.plan if self.plan == "auto" else self.plan)
        return choice

    def use_plan_(self, plan: str) -> None:
        """Compute with this plan from now on. What is stored does not depend on it."""
        check_plan(plan, self.rank)
        self.active_plan = plan
        self.refresh_index_()

    @property
    def _needs_index(self) -> bool:
        return PLANS[self.active_plan].needs_live

    def refresh_index_(self) -> None:
        """Rebuild what is derived from the buffers, and take these for what is meant."""
        self._pattern.follow_(self.block_mask, self._buffers.get("block_position"), index=self._needs_index)

    def _follow(self) -> Pattern:
        """What is derived from the buffers as they are now.

        Raises:
            KronblocksError: they contradict each other.
        """
        mask, position = self._buffers["block_mask"], self._buffers.get("block_position")
        if not self._pattern.is_of(mask, position):  # pyright: ignore[reportArgumentType]
            self._follow_changed(mask, position)
        return self._pattern

    def _follow_changed(self, mask: Any, position: Tensor | None) -> None:
        pattern, values = self._pattern, self._parameters.get("values")
        if values is not None and (values.is_meta or is_sharded(values)):
            values = None
        with _disable_current_modes():
            if type(mask) is not Tensor:  # a tracer's, which shows no numbers: it stands for the one followed last
                if pattern.mask is None or pattern.is_fresh():
                    return
                mask, position, values = pattern.mask, pattern.position, None
            pattern.follow_(mask, position, values, index=self._needs_index)

    def _index(self) -> BlockIndex | None:
        """The index for the packed plan; None where nobody can look at the mask now, and the weight has to be built."""
        if torch.compiler.is_dynamo_compiling():  # the operators look, if the index is that of these buffers
            pattern = self._pattern
            same = pattern.mask is self.block_mask and pattern.position is getattr(self, "block_position", None)
            return pattern.index if same else None
        return None if is_transformed() else self._follow().index

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._pattern.moved_(fn, self.block_mask, self._buffers.get("block_position"))
        return self

    def _replicate_for_data_parallel(self) -> Self:
        replica: Any = super()._replicate_for_data_parallel()
        replica._pattern = Pattern()
        return replica

    def __prepare_scriptable__(self) -> NoReturn:
        raise KronblocksError(
            f"torch.jit.script cannot compile {self.kind}: use torch.export.export, torch.jit.trace or kronblocks.export(model)"
        )

    def keep_index_size_(self) -> None:
        """Let deaths shorten the packed index without making its tensors smaller: compiled code knows their sizes."""
        self._pattern.keeps_size = True

    @torch.no_grad()
    def mask_changed_(self) -> None:
        """Make the stored blocks agree with `block_mask`: exact zeros where it is False, and a fresh index."""
        self.refresh_index_()
        self.enforce_zeros_()

    @torch.no_grad()
    def set_block_mask_(self, mask: Tensor) -> None:
        """Kill the blocks where the mask is False; blocks that come alive start at zero.

        Args:
            mask: (m1, n1) bool, True = live.
        """
        self.grid.check_mask(mask)
        self.block_mask.copy_(mask)
        self.mask_changed_()

    @torch.no_grad()
    def scale_blocks_(self, multipliers: Tensor) -> None:
        """Multiply every block by its number, (m1, n1), in place; 0 kills the block."""
        if tuple(multipliers.shape) != self.grid.shape:
            raise KronblocksError(f"{self.grid} takes multipliers of {self.grid.shape}, not {tuple(multipliers.shape)}")
        self._multiply_(multipliers)
        died = self.block_mask & (multipliers == 0)
        if died.any():
            self.set_block_mask_(self.block_mask & ~died)

    @property
    def density(self) -> float:
        """Share of the blocks that are live."""
        return int(self.block_mask.sum()) / self.grid.blocks

    @property
    def weight(self) -> Tensor:
        """The dense weight, (out_features, in_features), built at every use; writing into it is an error."""
        return weight_of(self.dense_weight, self.block_parameters(), (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """Build the dense weight, (out_features, in_features); differentiable."""
        raise NotImplementedError

    def block_norms(self) -> Tensor:
        """Frobenius norm of every block, (m1, n1)."""
        raise NotImplementedError

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        """Which blocks of the weight hold a value other than exactly 0, (m1, n1) bool."""
        return (self.grid.to_blocks(self.dense_weight()) != 0).flatten(2).any(2)

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks, the bias not among them."""
        raise NotImplementedError

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Where the parameters hold some blocks and no others: `parameter[where]` for each pair.

        Args:
            blocks: (m1, n1) bool.
        """
        raise NotImplementedError

    def block_inner_products(self) -> Tensor:
        """<dW, W> of every block, (m1, n1), from the gradients that the parameters hold; 0 for dead blocks."""
        raise NotImplementedError

    def enforce_zeros_(self) -> None:
        """Set what belongs to dead blocks to exactly 0."""
        raise NotImplementedError

    def _multiply_(self, multipliers: Tensor) -> None:
        raise NotImplementedError

    def config(self) -> dict:
        """The constructor's arguments as plain values: what a structure record needs."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        live = "?" if self.block_mask.is_meta else int(self.block_mask.sum())
        factors = "" if self.rank is None else f", rank={self.rank}, tile_groups={self.tile_groups}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.grid.block}{factors}, "
            f"live={live}/{self.grid.blocks}, plan={self.active_plan}"
        )


def _before_state_dict(layer: BlockLayer, *_: object) -> None:
    """What is saved is what the layer computes with, also after an average that rounded positions."""
    if not layer.block_mask.is_meta:
        layer._follow()


def _after_load(layer: BlockLayer, _: object) -> None:
    """A loaded mask wants its zeros and its index. A function, not a lambda, so that layers can be pickled."""
    layer.mask_changed_()


def reset_bias_(bias: Tensor | None, in_features: int) -> None:
    """The default of nn.Linear: uniform within 1/sqrt(in_features)."""
    if bias is not None:
        nn.init.uniform_(bias, -(in_features**-0.5), in_features**-0.5)
