"""What the two block-sparse layers share: a grid, a mask, a plan and the index that the packed plan needs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kronblocks.blocks import BlockGrid
from kronblocks.errors import KronblocksError
from kronblocks.nn.loading import WholeWeights
from kronblocks.ops.choice import PlanChoice, choose_plan
from kronblocks.ops.cost import ASSUMED_ROWS, Problem, check_plan
from kronblocks.ops.packed import BlockIndex


class IndexHolder(nn.Module):
    """A `BlockIndex` that moves with the module and is never saved, since the mask says it all.

    A plain attribute and no buffers: compiled code takes sizes of buffers for fixed, and would be compiled anew at each death.
    """

    def __init__(self, grid: BlockGrid, capacity: int, device: torch.device | str | None) -> None:
        super().__init__()
        sizes = {"crow": grid.shape[0] + 1, "ccol": grid.shape[1] + 1}
        names = BlockIndex._fields
        self.index = BlockIndex(*(torch.zeros(sizes.get(n, capacity), dtype=torch.int32, device=device) for n in names))

    def _apply(self, fn, recurse=True):
        self.index = BlockIndex(*(fn(tensor) for tensor in self.index))
        return super()._apply(fn, recurse)


class BlockLayer(WholeWeights):
    """Base of `KroneckerBlockLinear` and `BlockSparseLinear`. Subclasses store the blocks and compute with them."""

    kind: str  # the class's name, also where fully_shard has made a class of its own
    block_mask: Tensor  # (m1, n1) bool, True = live

    def __init__(self, grid: BlockGrid, rank: int | None, tile_groups: int, plan: str, capacity: int, device) -> None:
        super().__init__()
        check_plan(plan, rank)
        self.grid = grid
        self.in_features, self.out_features = grid.in_features, grid.out_features
        self.rank, self.tile_groups = rank, tile_groups
        self.plan = plan
        self.rows = ASSUMED_ROWS
        self._index = IndexHolder(grid, capacity, device)
        self.register_buffer("block_mask", torch.ones(grid.shape, dtype=torch.bool, device=device))
        self.register_load_state_dict_post_hook(_after_load)

    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem:
        """This layer as the cost model sees it, at its present density."""
        weight = next(self.parameters(recurse=False))
        density = 1.0 if self.block_mask.is_meta else self.density
        rows, device = rows or self.rows, weight.device.type
        gate = getattr(self, "gate", None) is not None
        return Problem(self.grid, self.rank, self.tile_groups, rows, density, weight.dtype, device, training, input_grad, gate)

    def choose_plan_(self, rows: int | None = None, *, measure: bool = False) -> PlanChoice:
        """Choose the plan anew where the user wrote "auto", for the present density and this many rows of x.

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

    def refresh_index_(self) -> None:
        """Rebuild the packed index from the mask, where the active plan needs one."""
        device = self.block_mask.device
        if self.active_plan == "packed" and device.type != "meta":
            self._index.index = self._make_index()
        elif self._index.index.crow.device != device:  # load_state_dict(assign=True) moves only what is saved
            self._index.index = BlockIndex(*(torch.zeros_like(t, device=device) for t in self._index.index))

    def _make_index(self) -> BlockIndex:
        return BlockIndex.from_mask(self.block_mask)

    def keep_index_size_(self) -> None:
        """Let deaths shorten the packed index without making its tensors smaller."""

    @torch.no_grad()
    def mask_changed_(self) -> None:
        """Make the stored blocks agree with `block_mask`: exact zeros where it is False, and a fresh index."""
        self.enforce_zeros_()
        self.refresh_index_()

    @torch.no_grad()
    def set_block_mask_(self, mask: Tensor) -> None:
        """Kill the blocks where the mask is False; blocks that come alive start at zero.

        Args:
            mask: (m1, n1) bool, True = live.
        """
        self._check_mask(mask)
        self.block_mask.copy_(mask)
        self.mask_changed_()

    def _check_mask(self, mask: Tensor) -> None:
        if tuple(mask.shape) != self.grid.shape or mask.dtype != torch.bool:
            raise KronblocksError(
                f"the mask of {self.grid} is a bool tensor of {self.grid.shape}, not {mask.dtype} {tuple(mask.shape)}"
            )

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
        """The dense weight, (out_features, in_features), built at every access; read-only."""
        return self.dense_weight()

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


def _after_load(layer: BlockLayer, _: object) -> None:
    """A loaded mask wants its zeros and its index. A function, not a lambda, so that layers can be pickled."""
    layer.mask_changed_()


def reset_bias_(bias: Tensor | None, in_features: int) -> None:
    """The default of nn.Linear: uniform within 1/sqrt(in_features)."""
    if bias is not None:
        nn.init.uniform_(bias, -(in_features**-0.5), in_features**-0.5)
