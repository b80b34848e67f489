"""Problem: what the cost of a layer's product depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from kronblocks.core.blocks import BlockGrid
from kronblocks.ops.geometry import Convolution

ASSUMED_ROWS = 1024
"""Rows of x that `plan="auto"` assumes if the number is unknown."""


class ProductSizes(NamedTuple):
    """The sizes that the multiply-adds of a product depend on."""

    rows: int  # of x
    m1: int  # block rows and columns
    n1: int
    bm: int  # rows and columns of a block
    bn: int
    rank: int  # 0: free block values instead of factors
    groups: int
    live: int  # number of live blocks


@dataclass(frozen=True)
class Problem:
    """What the cost of a layer's product y = x W^T depends on; in a convolution, that of the whole convolution."""

    grid: BlockGrid
    rank: int | None  # None: free block values instead of factors
    tile_groups: int = 1
    rows: int = ASSUMED_ROWS  # rows of x
    density: float = 1.0  # live blocks / blocks
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = True
    input_grad: bool = True  # False for the first layer of a net, whose input needs no gradient
    gate: bool = False  # a trained gate beside the factors
    convolution: Convolution | None = None  # whose patches are the rows, with a known size

    @property
    def device_type(self) -> str:
        """ "cuda" of "cuda:1"."""
        return self.device.split(":")[0]

    @property
    def images(self) -> int:
        """How many images the rows belong to, in a convolution."""
        return 0 if self.convolution is None else max(1, self.rows // self.convolution.positions)

    @property
    def live_blocks(self) -> int:
        """How many blocks live, to the nearest whole number."""
        return round(self.density * self.grid.blocks)

    @property
    def sizes(self) -> ProductSizes:
        """The sizes that the multiply-adds depend on."""
        (m1, n1), (bm, bn) = self.grid.shape, self.grid.block
        return ProductSizes(self.rows, m1, n1, bm, bn, self.rank or 0, self.tile_groups, self.live_blocks)
