"""MaskedLinear: block methods for a plain `nn.Linear`. The layer keeps its weight, and the mask is kept here."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kronblocks.core.blocks import BlockGrid
from kronblocks.core.parameters import move_to_front_
from kronblocks.core.shards import is_sharded, rows_here, summed


class MaskedLinear:
    """The blocks of a plain `nn.Linear`, which itself stays unchanged (`HasBlocks` documents the methods).

    The layer computes with whatever its weight holds. So dead blocks are set to 0 after every step, and their gradients by a
    hook.

    Args:
        linear: the layer.
        grid: how its weight is cut into blocks.
        mask: (m1, n1) bool, True = live; None: all blocks live.
    """

    def __init__(self, linear: nn.Linear, grid: BlockGrid, mask: Tensor | None = None) -> None:
        self.linear, self.grid = linear, grid
        device = "cpu" if linear.weight.is_meta else linear.weight.device
        mask = torch.ones(grid.shape, dtype=torch.bool, device=device) if mask is None else mask
        self._mask = mask.to(device, copy=True)

    @property
    def _weight(self) -> nn.Parameter:
        return self.linear.get_parameter("weight")  # looked up each time: sharding the model replaces it

    @property
    def block_mask(self) -> Tensor:
        weight = self.linear._parameters.get("weight")  # None if it is computed from others now; the next step raises for that
        if weight is not None and self._mask.device != weight.device and weight.device.type != "meta":  # the model has moved
            self._mask = self._mask.to(weight.device)
        return self._mask

    @torch.no_grad()
    def block_norms(self) -> Tensor:
        if not is_sharded(self._weight):
            return self.grid.norms(self._weight)
        rows = rows_here(self._weight).local
        return self._sums(rows.to(torch.promote_types(rows.dtype, torch.float32)).square()).sqrt()

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        return self._sums((rows_here(self._weight).local != 0).float()) > 0

    @torch.no_grad()
    def block_inner_products(self) -> Tensor:
        return self._sums((rows_here(self._weight).local * rows_here(self._weight.grad).local).float())

    def block_parameters(self) -> list[nn.Parameter]:
        weight = self.linear._parameters.get("weight")
        return [] if weight is None else [weight]

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        return [(self._weight, self.grid.expand(blocks))]

    def set_block_mask_(self, mask: Tensor) -> None:
        self.grid.check_mask(mask)
        self._mask = mask.to(self.block_mask.device, copy=True)
        self.enforce_zeros_()

    @torch.no_grad()
    def scale_blocks_(self, multipliers: Tensor) -> None:
        rows, factors = self._beside(self._weight, multipliers)
        rows.mul_(factors.to(rows.dtype))

    @torch.no_grad()
    def enforce_zeros_(self) -> None:
        self._zero_dead_blocks(self._weight)

    def hook_gradients(self) -> RemovableHandle:
        """Make gradients of dead blocks exactly 0 in backward, so that clipping and closures see the truth."""
        found = weakref.ref(self)  # gc does not see the hooks of a parameter: a cycle through one would never be freed

        @torch.no_grad()
        def zero(parameter: Tensor) -> None:
            layer = found()
            if layer is not None and parameter.grad is not None:  # else an earlier hook has already stepped and cleared it
                layer._zero_dead_blocks(parameter.grad)

        weight = self._weight
        is_trained = weight.requires_grad
        weight.requires_grad_(True)  # frozen parameters accept no hooks, and may be unfrozen later
        handle = weight.register_post_accumulate_grad_hook(zero)
        weight.requires_grad_(is_trained)
        move_to_front_(weight, handle.id)  # other hooks may step an optimiser
        return handle

    def _zero_dead_blocks(self, weight: Tensor) -> None:
        rows, dead = self._beside(weight, ~self.block_mask)
        rows.masked_fill_(dead, 0)

    def _beside(self, weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The weight's rows in this process as (rows, n1, bn), and the grid's values for them as (rows, n1, 1)."""
        local, where = rows_here(weight)
        if isinstance(local, nn.Parameter):
            local = local.detach()
        spread = grid.to(local.device).repeat_interleave(self.grid.block.rows, 0)[where]
        return local.unflatten(1, (self.grid.shape[1], self.grid.block.cols)), spread.unsqueeze(-1)

    def _sums(self, rows: Tensor) -> Tensor:
        """Sum over each block, (m1, n1), of a tensor shaped like the rows that this process holds."""
        where = rows_here(self._weight).where
        block_row = torch.arange(where.start, where.stop, device=rows.device) // self.grid.block.rows
        sums = rows.unflatten(1, (self.grid.shape[1], self.grid.block.cols)).sum(-1)
        return summed(sums.new_zeros(self.grid.shape).index_add(0, block_row, sums), self._weight)
