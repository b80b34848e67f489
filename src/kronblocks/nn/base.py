"""What the block layers share: a grid, a mask, a plan and the index of the packed plan."""

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
from kronblocks.ops.geometry import Convolution
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.pattern import Pattern
from kronblocks.ops.plans import PLANS, check_plan
from kronblocks.ops.problem import ASSUMED_ROWS, Problem


class BlockLayer(WholeWeights):
    """Base of `KroneckerBlockLinear` and `BlockSparseLinear`. Subclasses store the blocks and compute with them.

    A layer's result depends on its parameters and buffers only. `_pattern` holds what is derived from the buffers (an index of
    the live blocks). `_follow` renews it when the buffers have been written to or replaced.
    """

    kind: str  # the class's name, since fully_shard makes another class of it
    block_mask: Tensor  # (m1, n1) bool, True = live
    convolution: Convolution | None = None  # that the layer is inside of; `rows` are its patches

    def __init__(self, grid: BlockGrid, rank: int | None, tile_groups: int, plan: str, device) -> None:
        super().__init__()
        check_plan(plan, rank)
        self.grid = grid
        self.in_features, self.out_features = grid.in_features, grid.out_features
        self.rank, self.tile_groups = rank, tile_groups
        self.plan = plan
        self.rows = ASSUMED_ROWS
        self._pattern = Pattern()  # not buffers: compiled code takes their sizes as fixed, and those of an index change
        self.register_buffer("block_mask", torch.ones(grid.shape, dtype=torch.bool, device=device))
        self.register_state_dict_pre_hook(_before_state_dict)
        self.register_load_state_dict_post_hook(_after_load)

    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem:
        """The layer's product for the cost model, at its present density."""
        weight = next(self.parameters(recurse=False))
        density = 1.0 if self.block_mask.is_meta else self.density
        rows, device = rows or self.rows, weight.device.type
        gate = getattr(self, "gate", None) is not None
        around = self.convolution if self.convolution is not None and self.convolution.size is not None else None
        return Problem(
            self.grid, self.rank, self.tile_groups, rows, density, weight.dtype, device, training, input_grad, gate, around
        )

    def choose_plan_(self, rows: int | None = None, *, measure: bool = False) -> PlanChoice:
        """Choose the plan again for the present density and number of rows, if the user wrote "auto".

        Args:
            rows: rows of x per call; None: as before.
            measure: choose by timings on this machine instead of counted costs.
        """
        self.rows = rows or self.rows
        choice = choose_plan(self.problem(), measure=measure)
        self.use_plan_(choice.plan if self.plan == "auto" else self.plan)
        return choice

    def use_plan_(self, plan: str) -> None:
        """Compute with this plan from now on. The state_dict does not depend on it."""
        check_plan(plan, self.rank)
        self.active_plan, self._needs_index = plan, PLANS[plan].needs_live
        self.refresh_index_()

    def _own(self, name: str) -> Any:
        """A parameter; torch's way of finding attributes costs more than the check of all operands."""
        own = self._parameters
        return own[name] if name in own else getattr(self, name)

    def refresh_index_(self) -> None:
        """Accept the buffers as they are now, and rebuild what is derived from them."""
        self._pattern.follow_(self.block_mask, self._buffers.get("block_position"), index=self._needs_index)

    def _follow(self) -> Pattern:
        """The pattern of the buffers as they are now.

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
            if type(mask) is not Tensor:  # a tracer's tensor without numbers: keep the last pattern
                if pattern.mask is None or pattern.is_fresh():
                    return
                mask, position, values = pattern.mask, pattern.position, None
            pattern.follow_(mask, position, values, index=self._needs_index)

    def _index(self) -> BlockIndex | None:
        """The index for the packed plan; None if the mask cannot be read now, and the weight has to be built."""
        pattern, buffers = self._pattern, self._buffers
        if torch.compiler.is_dynamo_compiling():  # the operators check whether the index is that of the buffers
            same = pattern.mask is self.block_mask and pattern.position is getattr(self, "block_position", None)
            return pattern.index if same else None
        if is_transformed():
            return None
        if pattern.is_of(buffers["block_mask"], buffers.get("block_position")):  # pyright: ignore[reportArgumentType]
            return pattern.index
        return self._follow().index

    def packed_operands(self) -> tuple[Tensor, BlockIndex] | None:
        """Values (capacity, bm, bn) of the live blocks, differentiable, and where they are; None if another plan computes."""
        index = self._index() if self._needs_index else None
        return None if index is None else self._operands_at(index)

    def _operands_at(self, index: BlockIndex) -> tuple[Tensor, BlockIndex]:
        raise NotImplementedError

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
        """From now on, keep the sizes of the index's tensors when blocks die, since compiled code relies on them."""
        self._pattern.keeps_size = True

    @torch.no_grad()
    def mask_changed_(self) -> None:
        """Make the stored blocks agree with `block_mask`: exact zeros where it is False, and a fresh index."""
        self.refresh_index_()
        self.enforce_zeros_()

    @torch.no_grad()
    def set_block_mask_(self, mask: Tensor) -> None:
        """Make exactly the blocks live where the mask, (m1, n1) bool, is True. Blocks that come alive start at zero."""
        self.grid.check_mask(mask)
        self.block_mask.copy_(mask)
        self.mask_changed_()

    @torch.no_grad()
    def scale_blocks_(self, multipliers: Tensor) -> None:
        """Multiply every block by its number in an (m1, n1) grid, in place; 0 kills the block."""
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
        """The dense weight, (out_features, in_features), built at every use. Writing into it is an error."""
        return weight_of(self.dense_weight, self.block_parameters(), (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """Build the dense weight, (out_features, in_features); differentiable."""
        raise NotImplementedError

    def block_norms(self) -> Tensor:
        """Frobenius norm of every block, (m1, n1)."""
        raise NotImplementedError

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        """Which blocks hold a value other than exactly 0, (m1, n1) bool."""
        return (self.grid.to_blocks(self.dense_weight()) != 0).flatten(2).any(2)

    def block_parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks, without the bias."""
        raise NotImplementedError

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a parameter and an index: `parameter[index]` holds these blocks and no others.

        Args:
            blocks: (m1, n1) bool.
        """
        raise NotImplementedError

    def block_inner_products(self) -> Tensor:
        """<dW, W> of every block, (m1, n1), from the parameters' present gradients; 0 for dead blocks."""
        raise NotImplementedError

    def enforce_zeros_(self) -> None:
        """Set the stored values of dead blocks to exactly 0."""
        raise NotImplementedError

    def _multiply_(self, multipliers: Tensor) -> None:
        raise NotImplementedError

    def config(self) -> dict:
        """The constructor's arguments as plain values, for a structure record."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "block_size": str(self.grid.block)}
        return {**sizes, **self._own_config(), "bias": self.bias is not None, "plan": self.plan}

    def _own_config(self) -> dict:
        raise NotImplementedError

    def extra_repr(self) -> str:
        live = "?" if self.block_mask.is_meta else int(self.block_mask.sum())
        factors = "" if self.rank is None else f", rank={self.rank}, tile_groups={self.tile_groups}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.grid.block}{factors}, "
            f"live={live}/{self.grid.blocks}, plan={self.active_plan}"
        )


def _before_state_dict(layer: BlockLayer, *_: object) -> None:
    """Mend positions that an average has rounded before they are saved."""
    if not layer.block_mask.is_meta:
        layer._follow()


def _after_load(layer: BlockLayer, _: object) -> None:
    """After loading, apply the mask and renew the index. A function, not a lambda, so that layers can be pickled."""
    layer.mask_changed_()


def reset_bias_(bias: Tensor | None, in_features: int) -> None:
    """The default of nn.Linear: uniform within 1/sqrt(in_features)."""
    if bias is not None:
        nn.init.uniform_(bias, -(in_features**-0.5), in_features**-0.5)
