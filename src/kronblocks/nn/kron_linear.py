"""A linear layer whose weight is a sum of Kronecker products: each block is a mixture of a few shared tiles."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.core.shards import assembled, is_sharded, rows_here, whole
from kronblocks.nn.base import BlockLayer, reset_bias_
from kronblocks.nn.built import is_transformed
from kronblocks.nn.inputs import map_unusual
from kronblocks.ops import kron
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.nearest import nearest_kronecker_sum
from kronblocks.ops.operands import autocast


class KroneckerBlockLinear(BlockLayer):
    """y = x W^T + bias, where block (p, q) of W is gate[p,q] * sum_i coeff[p,q,i] * tiles[group(p), i].

    Equations 2 and 3 in docs/math.md. Parameters: `coeff` (m1, n1, r), `tiles` (g, r, bm, bn), `gate` (m1, n1) if asked for, and
    `bias`. The buffer `block_mask` (m1, n1) says which blocks are live; dead ones have coefficients of exactly 0 and get no
    gradient. The state_dict does not depend on the plan.

    Args:
        in_features: n, columns of W.
        out_features: m, rows of W.
        block_size: 16, "16x4" or (16, 4), rows first; must divide (out_features, in_features).
        rank: number of Kronecker terms r.
        tile_groups: g, number of tile banks; divides m1. 1 is the paper's layer; m1 gives each block row its own tiles.
        gate: add the paper's trained gate S, which starts at 1.
        bias: add a trained bias.
        plan: "auto" or a plan of `kronblocks.ops`; fixed outside `forward`, see `use_plan_`.

    Raises:
        KronblocksError: sizes that do not divide, a rank below 1, a plan that cannot compute this layer.

    Source:
        Zhu, Zuo, Khalili, "An Efficient Training Algorithm for Models with Block-wise Sparsity", TMLR 2025, section 3.

    >>> layer = KroneckerBlockLinear(8, 6, "3x2", rank=2)
    >>> layer(torch.ones(5, 8)).shape
    torch.Size([5, 6])
    """

    kind = "KroneckerBlockLinear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: BlockSize | int | str | tuple[int, int],
        rank: int,
        *,
        tile_groups: int = 1,
        gate: bool = False,
        bias: bool = True,
        plan: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        grid = BlockGrid(out_features, in_features, BlockSize.parse(block_size))
        (m1, n1), (bm, bn) = grid.shape, grid.block
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise KronblocksError(f"rank is the number of Kronecker terms, a whole number from 1 on, not {rank!r}")
        if isinstance(tile_groups, bool) or not isinstance(tile_groups, int) or tile_groups < 1 or m1 % tile_groups:
            raise KronblocksError(f"tile_groups must divide the {m1} block rows, and {tile_groups!r} does not")
        super().__init__(grid, rank, tile_groups, plan, device)
        factory = {"device": device, "dtype": dtype}
        self.coeff = nn.Parameter(torch.empty(m1, n1, rank, **factory))
        self.tiles = nn.Parameter(torch.empty(tile_groups, rank, bm, bn, **factory))
        self.gate = nn.Parameter(torch.empty(m1, n1, **factory)) if gate else None
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.choose_plan_()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        block_size: BlockSize | int | str | tuple[int, int],
        rank: int,
        tile_groups: int = 1,
        gate: bool = False,
        plan: str = "auto",
    ) -> Self:
        """Make the layer nearest to a dense one, by a truncated SVD of the rearranged weight (equation 11 in docs/math.md)."""
        weight = linear.weight.detach()
        layer = cls(
            linear.in_features,
            linear.out_features,
            block_size,
            rank,
            tile_groups=tile_groups,
            gate=gate,
            bias=linear.bias is not None,
            plan=plan,
            device="meta",
            dtype=weight.dtype,
        ).to_empty(device=weight.device)
        coeff, tiles, _ = nearest_kronecker_sum(weight, layer.grid, rank, tile_groups=tile_groups)
        with torch.no_grad():
            layer.block_mask.fill_(True)
            layer.coeff.copy_(coeff)
            layer.tiles.copy_(tiles)
            if layer.gate is not None:
                layer.gate.fill_(1)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        layer.choose_plan_()  # for the device where it is now
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal tiles and normal coefficients. W has the variance of nn.Linear's default (equation 13)."""
        self.block_mask.fill_(True)
        reset_bias_(self.bias, self.in_features)
        if self.gate is not None:
            self.gate.fill_(1)
        if self.tiles.is_meta:
            return
        groups, rank, bm, bn = self.tiles.shape
        dtype = torch.promote_types(self.tiles.dtype, torch.float32)
        flat = torch.randn(groups, bm * bn, rank, device=self.tiles.device, dtype=dtype)
        flat = torch.linalg.qr(flat).Q if rank <= bm * bn else nn.functional.normalize(flat, dim=1)
        self.tiles.copy_(flat.transpose(1, 2).reshape(self.tiles.shape))
        self.coeff.normal_(0, math.sqrt(bm * bn / rank / (3 * self.in_features)))
        self.refresh_index_()

    @torch.no_grad()
    def match_variance_(self, weight: Tensor | None = None) -> None:
        """Scale the coefficients so that W has the mean square of a dense weight.

        Many models do not start with nn.Linear's default variance, and train worse with it.

        Args:
            weight: (m, n). None, or all zeros: use nn.Linear's default, 1/(3n) (equation 13).
        """
        mean_square = self.block_norms().square().sum() / self.grid.weights
        wanted = 0.0 if weight is None else float(whole(weight.detach()).float().square().mean())
        wanted = wanted or 1 / (3 * self.in_features)
        if mean_square > 0:
            self.coeff.mul_((wanted / mean_square).sqrt().to(self.coeff.dtype))

    def effective_coeff(self) -> Tensor:
        """The coefficients times the gate, (m1, n1, r)."""
        return self.coeff if self.gate is None else self.coeff * self.gate.unsqueeze(-1)

    def forward(self, input: Tensor) -> Tensor:
        if getattr(input, "layout", None) is not torch.strided or input.is_nested:
            return map_unusual(self, input)
        if is_transformed():
            return nn.functional.linear(*autocast(input, self.dense_weight(), self.bias))
        plan, live = self.active_plan, self.block_mask
        if self._needs_index:
            live = self._index()
            plan, live = ("dense", self.block_mask) if live is None else (plan, live)
        return kron.kron_linear(input, self.effective_coeff(), self.tiles, self.bias, plan=plan, live=live)

    def _operands_at(self, index: BlockIndex) -> tuple[Tensor, BlockIndex]:
        coeff, tiles = autocast(self.effective_coeff(), self.tiles)
        return kron.packed_operands(coeff, tiles, index)

    def dense_weight(self) -> Tensor:
        coeff = self.effective_coeff().masked_fill(~self.block_mask.unsqueeze(-1), 0)
        return kron.kron_weight(coeff, self.tiles)

    @torch.no_grad()
    def block_norms(self) -> Tensor:
        coeff, tiles, _ = self._factors_here()
        return assembled(kron.block_norms(coeff, tiles) if len(coeff) else coeff[..., 0], self.coeff)

    def _factors_here(self) -> tuple[Tensor, Tensor, slice]:
        """Of the block rows that this process holds: the gated coefficients, their tiles, and which rows they are."""
        coeff, rows = rows_here(self.coeff)
        if self.gate is not None:
            coeff = coeff * rows_here(self.gate).local.unsqueeze(-1)
        tiles = self.tiles
        if is_sharded(tiles):  # a bank for each of the rows here
            per_bank = self.grid.shape[0] // self.tile_groups
            tiles = rows_here(tiles).local if per_bank == 1 else whole(tiles).repeat_interleave(per_bank, 0)[rows]
        return coeff, tiles, rows

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        coeff, tiles, rows = self._factors_here()
        coeff = coeff.masked_fill(~self.block_mask[rows].unsqueeze(-1), 0)
        (_, n1), (bm, bn) = self.grid.shape, self.grid.block
        blocks = kron.kron_weight(coeff, tiles).view(len(coeff), bm, n1, bn) if len(coeff) else coeff.new_zeros(0, bm, n1, bn)
        return assembled((blocks != 0).any(3).any(1).to(torch.uint8), self.coeff) > 0

    @torch.no_grad()
    def set_block_mask_(self, mask: Tensor) -> None:
        self.grid.check_mask(mask)
        self.enforce_zeros_()  # the mask may have been written to
        if self.gate is not None:  # a block whose gate and coefficients are both 0 would get no gradient and could not grow
            gate, rows = rows_here(self.gate)
            gate.masked_fill_((mask & ~self.block_mask)[rows], 1)
        super().set_block_mask_(mask)

    def block_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.coeff, self.tiles, self.gate) if p is not None]

    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        return [(p, blocks) for p in (self.coeff, self.gate) if p is not None]

    def block_inner_products(self) -> Tensor:
        """<dW, W> is the inner product of a block's coefficients with their gradient, since W is linear in them."""
        products = (rows_here(self.coeff).local * rows_here(self.coeff.grad).local).float().sum(-1)
        return assembled(products, self.coeff).masked_fill(~self.block_mask, 0)

    @torch.no_grad()
    def enforce_zeros_(self) -> None:
        coeff, rows = rows_here(self.coeff)
        dead = ~self.block_mask[rows]
        coeff.masked_fill_(dead.unsqueeze(-1), 0)
        if self.gate is not None:
            rows_here(self.gate).local.masked_fill_(dead, 0)

    def _multiply_(self, multipliers: Tensor) -> None:
        target, rows = rows_here(self.coeff if self.gate is None else self.gate)
        multipliers = multipliers[rows].to(target.dtype)
        target.mul_(multipliers.unsqueeze(-1) if self.gate is None else multipliers)

    def _own_config(self) -> dict:
        return {"rank": self.rank, "tile_groups": self.tile_groups, "gate": self.gate is not None}
