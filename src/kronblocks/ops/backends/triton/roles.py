"""Coefficients and tiles in the roles that they play in a product: forward, or adjoint."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronblocks.ops.backends.triton.launch import cells
from kronblocks.ops.backends.triton.tuning import Sizes


@dataclass(frozen=True)
class Roles:
    """Forward, tiles turn input blocks into output blocks; adjoint, inputs are outputs and tiles are transposed.

    A sum over input blocks has parts: banks of tiles that one program goes through, times the terms it takes together. Output
    blocks are taken in chunks, each of one bank where banks divide the outputs.
    """

    planes: Tensor  # coefficients, (r, m1, n1)
    tiles: Tensor  # (g, r, bm, bn)
    live: Tensor | None  # (m1, n1), uint8
    outputs: int  # blocks
    sources: int
    tile_out: int  # sides of a tile
    tile_in: int
    bank_of_output: bool  # which side of the grid the groups of tiles divide

    @classmethod
    def of(cls, coeff: Tensor, tiles: Tensor, live: Tensor | None) -> Roles:
        """Forward; coeff (m1, n1, r), tiles (g, r, bm, bn), live (m1, n1) bool."""
        (m1, n1, _), (bm, bn) = coeff.shape, tiles.shape[2:]
        planes = coeff.permute(2, 0, 1)
        planes = (planes if live is None else planes.where(live, 0)).contiguous()
        mask = None if live is None else live.contiguous().view(torch.uint8)
        return cls(planes, tiles.contiguous(), mask, m1, n1, bm, bn, bank_of_output=True)

    def adjoint(self) -> Roles:
        """The roles in which x W^T is dy W."""
        return replace(
            self, outputs=self.sources, sources=self.outputs, tile_out=self.tile_in, tile_in=self.tile_out, bank_of_output=False
        )

    @property
    def rank(self) -> int:
        return self.planes.shape[0]

    @property
    def banks(self) -> int:
        return self.tiles.shape[0]

    @property
    def own_banks(self) -> int:
        """Banks that one program goes through."""
        return 1 if self.bank_of_output else self.banks

    @property
    def outputs_per_bank(self) -> int:
        return self.outputs // self.banks if self.bank_of_output else self.outputs

    @property
    def sources_per_bank(self) -> int:
        return self.sources if self.bank_of_output else self.sources // self.banks

    @property
    def strides(self) -> tuple[int, int]:
        """The strides of output and input blocks in a grid."""
        n1 = self.planes.shape[2]
        return (n1, 1) if self.bank_of_output else (1, n1)

    @property
    def is_half(self) -> bool:
        """Whether a value has two bytes."""
        return self.tiles.element_size() == 2

    def chunks_per_bank(self, sizes: Sizes) -> int:
        return cells(self.outputs_per_bank, sizes.outputs)

    def chunks(self, sizes: Sizes) -> int:
        return self.chunks_per_bank(sizes) * (self.banks if self.bank_of_output else 1)

    def parts(self, sizes: Sizes) -> int:
        return self.own_banks * cells(self.rank, sizes.terms)
