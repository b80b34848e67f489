"""BlockIndex: where the live blocks of a grid are, for the packed products."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kronblocks.core.errors import KronblocksError


class BlockIndex(NamedTuple):
    """Where the live blocks of an (m1, n1) grid are; all tensors int32.

    Entries `0 .. crow[-1]-1` are the live blocks in row-major order. The rest is padding, so that shapes stay when an index
    shrinks. `order` lists the entries column by column, for transposed products.
    """

    crow: Tensor  # (m1 + 1,)  first entry of each block row
    col: Tensor  # (capacity,) block column of an entry
    row: Tensor  # (capacity,) block row of an entry
    slot: Tensor  # (capacity,) the slot of an entry in `values`
    ccol: Tensor  # (n1 + 1,)  first position in `order` of each block column
    order: Tensor  # (capacity,) entries sorted by block column

    @classmethod
    def from_mask(cls, mask: Tensor, position: Tensor | None = None) -> BlockIndex:
        """Make the index of the live blocks of a mask.

        Args:
            mask: (m1, n1) bool, True = live.
            position: (capacity,) row-major block number of each slot of `values`. None: the slots are the live blocks in
                row-major order.
        """
        m1, n1 = mask.shape
        live = mask.flatten()
        if position is None:
            position = live.nonzero().squeeze(1)
            slot = torch.arange(len(position), device=mask.device)
        else:
            slot = live[position].nonzero().squeeze(1)
            if len(slot) < int(live.sum()):
                raise KronblocksError("a live block of the mask has no slot: position must name every live block")
            slot = slot[position[slot].argsort()]
        capacity, entry = len(position), position[slot].long()
        row, col = entry // n1, entry % n1
        order = (col * m1 + row).argsort()

        def padded(index: Tensor) -> Tensor:
            return torch.nn.functional.pad(index, (0, capacity - len(index))).to(torch.int32)

        def starts(index: Tensor, size: int) -> Tensor:
            return torch.nn.functional.pad(torch.bincount(index, minlength=size).cumsum(0), (1, 0)).to(torch.int32)

        return cls(starts(row, m1), padded(col), padded(row), padded(slot), starts(col, n1), padded(order))

    @classmethod
    def blank(cls, grid: tuple[int, int] | torch.Size, position: Tensor | None) -> BlockIndex:
        """An index of the right sizes on the meta device."""
        (m1, n1), capacity = grid, 0 if position is None else len(position)
        sizes = (m1 + 1, capacity, capacity, capacity, n1 + 1, capacity)
        return cls(*(torch.empty(size, dtype=torch.int32, device="meta") for size in sizes))

    @property
    def grid(self) -> tuple[int, int]:
        """(m1, n1)."""
        return self.crow.shape[0] - 1, self.ccol.shape[0] - 1


NO_INDEX_GRADIENTS = (None,) * len(BlockIndex._fields)
"""The gradients that a backward returns for an operator's index."""
