"""A linear layer that stores only the live blocks of its weight, as free values."""

from __future__ import annotations

import warnings
from typing import Self

import torch
from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.parameters import become_
from kronblocks.core.shards import assembled, is_sharded, rows_here
from kronblocks.nn.base import BlockLayer, reset_bias_
from kronblocks.nn.built import is_transformed
from kronblocks.nn.inputs import map_unusual
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.operands import autocast, check_product
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.pattern import current_slots


class BlockSparseLinear(BlockLayer):
    """y = x W^T + bias, where W has free values on its live blocks and is zero elsewhere (equation 7 in docs/math.md).

    Parameters: `values` (capacity, bm, bn) and `bias`. Buffers: `block_mask` (m1, n1) and `block_position` (capacity,), the
    row-major number of each slot's block. Until `compact_`, dead blocks keep their slots, with values and gradients of 0.

    Args:
        in_features: n, columns of W.
        out_features: m, rows of W.
        block_size: 16, "16x4" or (16, 4), rows first; must divide (out_features, in_features).
        mask: (m1, n1) bool, True = live; None: all blocks. Each live block gets a slot.
        capacity: number of slots, given instead of the mask for a layer that `load_state_dict` will fill.
        bias: add a trained bias.
        plan: "auto", "packed" (live blocks only) or "dense" (build W, then one dense product).

    Raises:
        KronblocksError: sizes that do not divide, a mask of another shape, both mask and capacity.

    >>> layer = BlockSparseLinear(8, 6, "3x2", mask=torch.eye(2, 4, dtype=torch.bool))
    >>> layer(torch.ones(5, 8)).shape, layer.values.shape
    (torch.Size([5, 6]), torch.Size([2, 3, 2]))
    """

    block_position: Tensor  # (capacity,) int64

    kind = "BlockSparseLinear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: BlockSize | int | str | tuple[int, int],
        *,
        mask: Tensor | None = None,
        capacity: int | None = None,
        bias: bool = True,
        plan: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = BlockGrid(out_features, in_features, BlockSize.parse(block_size))
        mask = starting_mask(grid, mask, capacity)
        slots = mask.flatten().nonzero().squeeze(1).to(device)
        super().__init__(grid, None, 1, plan, device)
        self.values = nn.Parameter(torch.empty(len(slots), *grid.block, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("block_position", slots)
        self.block_mask.copy_(mask)
        self._outline = mask if self.block_mask.is_meta else None
        self.choose_plan_()
        self.reset_parameters()

    @classmethod
    def _like(cls, layer: nn.Linear | KroneckerBlockLinear, grid: BlockGrid, mask: Tensor, plan: str) -> Self:
        """A layer with the bias of another one, and with its blocks where the mask is True."""
        with torch.no_grad():
            weight = layer.weight
            new = cls(
                grid.in_features,
                grid.out_features,
                grid.block,
                mask=mask,
                bias=layer.bias is not None,
                plan=plan,
                device="meta",  # draws no random numbers
                dtype=weight.dtype,
            ).to_empty(device=weight.device)
            new.values.copy_(grid.to_blocks(weight)[mask])
            if new.bias is not None and layer.bias is not None:
                new.bias.copy_(layer.bias)
        new.choose_plan_()
        return new.train(layer.training)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        *,
        block_size: BlockSize | int | str | tuple[int, int],
        mask: Tensor,
        plan: str = "auto",
    ) -> Self:
        """Make a layer of the blocks of a dense one where the mask, (m1, n1) bool, is True."""
        grid = BlockGrid(linear.out_features, linear.in_features, BlockSize.parse(block_size))
        return cls._like(linear, grid, mask, plan)

    @classmethod
    def from_kron(cls, layer: KroneckerBlockLinear, *, plan: str = "auto") -> Self:
        """Lift a Kronecker layer: its live blocks become free values. The bias keeps its parameter object."""
        new = cls._like(layer, layer.grid, layer.block_mask, plan)
        new.bias = layer.bias
        new.choose_plan_(layer.rows)
        return new

    @torch.no_grad()
    def _apply(self, fn, recurse: bool = True) -> Self:
        """Also keep the mask when a layer leaves the meta device, where `to_empty` would leave it undefined."""
        outline = self._outline if self.block_mask.is_meta else None
        super()._apply(fn, recurse)
        if outline is not None and not self.block_mask.is_meta:
            self.block_mask.copy_(outline)
            self.block_position.copy_(outline.flatten().nonzero().squeeze(1))
            self._outline = None
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform values, so that outputs have the scale of nn.Linear's default (equation 27). The mask stays."""
        live = self.grid.blocks if self.block_mask.is_meta else int(self.block_mask.sum())
        bound = (self.in_features * max(live, 1) / self.grid.blocks) ** -0.5
        nn.init.uniform_(self.values, -bound, bound)
        reset_bias_(self.bias, self.in_features)
        self.mask_changed_()

    @property
    def capacity(self) -> int:
        """Number of slots in `values`."""
        return self.values.shape[0]

    def positions(self) -> Tensor:
        """`block_position`, (capacity,), after a check that every live block has a slot.

        Raises:
            KronblocksError: one has none.
        """
        if torch.compiler.is_dynamo_compiling():  # values are not known now; an operator checks them at every call
            pattern, position = self._pattern, self.block_position
            same = pattern.slots is not None and pattern.mask is self.block_mask and pattern.position is position
            return current_slots(pattern.slots, self.values.detach()) if same and not torch.compiler.is_exporting() else position
        if not is_transformed():
            self._follow()
        return self.block_position

    def _dead_slots(self, position: Tensor) -> Tensor:
        """Which slots hold dead blocks, (capacity, 1, 1) bool."""
        return ~self.block_mask.view(-1)[position].view(-1, 1, 1)

    @property
    def has_dead_slots(self) -> bool:
        """Whether `compact_` would free slots."""
        return not is_sharded(self.values) and bool(self._dead_slots(self.positions()).any())

    def forward(self, input: Tensor) -> Tensor:
        if getattr(input, "layout", None) is not torch.strided or input.is_nested:
            return map_unusual(self, input)
        if self._needs_index and (index := self._index()) is not None:
            return packed_linear(input, self._own("values"), index, self._own("bias"))
        x, weight, bias = autocast(input, self.dense_weight(), self.bias)
        shape = self.grid.shape[1], self.grid.block.cols
        check_product(x, *shape, bias, self.out_features, {"values": weight}, self.block_mask)
        return nn.functional.linear(x, weight, bias)

    def _operands_at(self, index: BlockIndex) -> tuple[Tensor, BlockIndex]:
        return self._own("values"), index

    def dense_weight(self) -> Tensor:
        weight = self.grid.from_blocks(self.dense_blocks())
        return weight.clone() if weight._base is not None else weight  # not the values themselves, which callers may write into

    def dense_blocks(self) -> Tensor:
        """All blocks, (m1, n1, bm, bn), dead ones zero; differentiable. Where all live, these can be the values themselves."""
        position = self.positions()
        plain = not torch.compiler.is_compiling() and not is_transformed() and type(self.values.data) is Tensor
        if plain and self._pattern.in_order:
            return self.values.view(*self.grid.shape, *self.grid.block)
        values = self.values.masked_fill(self._dead_slots(position), 0)
        blocks = values.new_zeros(self.grid.blocks, *self.grid.block).index_copy(0, position, values)
        return blocks.unflatten(0, self.grid.shape)

    def to_torch_bsr(self) -> Tensor:
        """The weight as a torch tensor in BSR layout, live blocks only, detached."""
        index = BlockIndex.from_mask(self.block_mask, self.positions())
        live = int(index.crow[-1])
        values = self.values.detach()[index.slot[:live]]
        size = (self.out_features, self.in_features)
        with warnings.catch_warnings():  # torch warns once per process that BSR is in beta
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support")
            return torch.sparse_bsr_tensor(index.crow, index.col[:live], values, size, check_invariants=True)

    @torch.no_grad()
    def block_norms(self) -> Tensor:
        values = rows_here(self.values).local
        norms = torch.linalg.vector_norm(values, dim=(1, 2), dtype=torch.promote_types(values.dtype, torch.float32))
        norms = assembled(norms, self.values)
        return norms.new_zeros(self.grid.blocks).index_copy(0, self.positions(), norms).view(self.grid.shape)

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        position, (values, rows) = self.positions(), rows_here(self.values)
        found = (values.masked_fill(self._dead_slots(position)[rows], 0) != 0).flatten(1).any(1).to(torch.uint8)
        found = assembled(found, self.values)
        return (found.new_zeros(self.grid.blocks).index_copy(0, position, found) > 0).view(self.grid.shape)

    def block_parameters(self) -> list[nn.Parameter]:
        return [self.values]

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        return [(self.values, blocks.flatten()[self.positions()])]

    def block_inner_products(self) -> Tensor:
        products = (rows_here(self.values).local * rows_here(self.values.grad).local).float().sum((1, 2))
        products = assembled(products, self.values)
        return products.new_zeros(self.grid.blocks).index_copy(0, self.positions(), products).view(self.grid.shape)

    @torch.no_grad()
    def enforce_zeros_(self) -> None:
        position, (values, rows) = self.positions(), rows_here(self.values)
        values.masked_fill_(self._dead_slots(position)[rows], 0)

    def _multiply_(self, multipliers: Tensor) -> None:
        values, rows = rows_here(self.values)
        values.mul_(multipliers.flatten()[self.positions()[rows]].view(-1, 1, 1).to(values.dtype))

    @torch.no_grad()
    def set_block_mask_(self, mask: Tensor) -> None:
        """Make exactly the blocks of the mask live. Blocks that come alive start at zero, in the slots of dead ones.

        Raises:
            KronblocksError: the mask has more live blocks than there are slots.
        """
        self.grid.check_mask(mask)
        position = self.positions()
        homeless = mask.flatten().index_fill(0, position, False).nonzero().squeeze(1)
        free = (~mask.flatten()[position]).nonzero().squeeze(1)
        if len(homeless) > len(free):
            raise KronblocksError(
                f"{int(mask.sum())} live blocks do not fit into the {self.capacity} slots of values: make a new layer with "
                "BlockSparseLinear.from_dense(linear, block_size=..., mask=...)"
            )
        self.enforce_zeros_()  # the mask may have been written to
        slots = free[: len(homeless)]
        values, rows = rows_here(self.values)
        fresh = torch.zeros(self.capacity, dtype=torch.bool, device=values.device).index_fill_(0, slots, True)
        values.masked_fill_(fresh[rows].view(-1, 1, 1), 0)
        position[slots] = homeless
        super().set_block_mask_(mask)

    @torch.no_grad()
    def compact_(self) -> Tensor:
        """Free the slots of dead blocks. `values` stays the same object, but becomes smaller and loses its gradient.

        Raises:
            KronblocksError: the values are sharded.

        Returns:
            (new capacity,) the slots that were kept, to update optimiser state that is kept per slot.
        """
        if is_sharded(self.values):
            raise KronblocksError("values are sharded and keep their slots: call compact_() before fully_shard")
        position = self.positions()
        kept = (~self._dead_slots(position)).flatten().nonzero().squeeze(1)
        if len(kept) == self.capacity:
            return kept
        become_(self.values, self.values[kept])
        self.block_position = position[kept]
        self.refresh_index_()
        return kept

    def _own_config(self) -> dict:
        return {"capacity": self.capacity}


def starting_mask(grid: BlockGrid, mask: Tensor | None, capacity: int | None) -> Tensor:
    """The mask of a new layer, on the CPU if it is not given: all blocks, or the first ones as a layer has slots.

    Raises:
        KronblocksError: both are given, or one does not fit the grid.
    """
    if mask is not None and capacity is not None:
        raise KronblocksError("give mask or capacity, not both: the live blocks of a mask get the slots")
    if mask is not None and (tuple(mask.shape) != grid.shape or mask.dtype != torch.bool):
        raise KronblocksError(f"mask must be bool of shape {grid.shape}, not {mask.dtype} {tuple(mask.shape)}")
    if capacity is not None and not 0 <= capacity <= grid.blocks:
        raise KronblocksError(f"capacity must be from 0 to the {grid.blocks} blocks of {grid}, not {capacity}")
    if mask is None:
        mask = torch.zeros(grid.shape, dtype=torch.bool, device="cpu")  # also under torch.device("meta")
        mask.view(-1)[: grid.blocks if capacity is None else capacity] = True
    return mask
