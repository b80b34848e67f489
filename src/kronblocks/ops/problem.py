"""One layer's product, as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kronblocks.blocks import BlockGrid

ASSUMED_ROWS = 1024
"""Rows of x that `plan="auto"` assumes where nobody has said how many there will be."""


@dataclass(frozen=True)
class Problem:
    """One layer's product y = x W^T, as far as its cost depends on it."""

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
