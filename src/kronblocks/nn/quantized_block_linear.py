"""A finished linear layer whose live blocks are int8, for inference."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear, starting_mask
from kronblocks.nn.built import weight_of
from kronblocks.nn.inputs import map_unusual
from kronblocks.nn.loading import WholeWeights
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.packed_int8 import check_inputs, packed_linear_int8, quantized_blocks


class QuantizedBlockLinear(WholeWeights):
    """y = x W^T + bias with whole numbers from -127 to 127 on live blocks (equation 28 in docs/math.md). It is not trained.

    Buffers: `values` (live, bm, bn) int8, in row-major order of the blocks; `scales` (m,) float32, one for each row of W; `bias`
    (m,) float32 or None; `block_mask` (m1, n1). y has the dtype of x, which is quantised row by row as it comes. `scales` and
    `bias` stay float32 when the model's dtype changes.

    Args:
        in_features: n, columns of W; at most 131,072.
        out_features: m, rows of W.
        block_size: 16, "16x4" or (16, 4), rows first; must divide (out_features, in_features).
        mask: (m1, n1) bool, True = live; None: all blocks.
        capacity: number of live blocks, given instead of the mask for a layer that `load_state_dict` will fill.
        bias: with a bias.

    Raises:
        KronblocksError: sizes that do not divide, too many inputs, a mask of another shape, both mask and capacity.

    >>> packed = BlockSparseLinear(8, 6, "3x2", mask=torch.eye(2, 4, dtype=torch.bool))
    >>> layer = QuantizedBlockLinear.from_packed(packed)
    >>> x = torch.ones(5, 8)
    >>> layer.values.dtype, bool((layer(x) - packed(x)).abs().max() < 0.02)
    (torch.int8, True)
    """

    values: Tensor
    scales: Tensor
    bias: Tensor | None
    block_mask: Tensor

    kind = "QuantizedBlockLinear"
    active_plan = "packed-int8"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: BlockSize | int | str | tuple[int, int],
        *,
        mask: Tensor | None = None,
        capacity: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        grid = BlockGrid(out_features, in_features, BlockSize.parse(block_size))
        check_inputs(in_features)
        mask = starting_mask(grid, mask, capacity)
        super().__init__()
        self.grid, self.in_features, self.out_features = grid, in_features, out_features
        live, m = int(mask.sum()), out_features
        self.register_buffer("values", torch.zeros(live, *grid.block, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(m, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(m, dtype=torch.float32, device=device) if bias else None)
        self.register_buffer("block_mask", torch.empty(grid.shape, dtype=torch.bool, device=device).copy_(mask))
        for name, tensor in BlockIndex.from_mask(mask)._asdict().items():
            self.register_buffer(f"index_{name}", tensor.to(self.block_mask.device), persistent=False)
        self.register_load_state_dict_post_hook(_after_load)

    @classmethod
    @torch.no_grad()
    def from_packed(cls, layer: BlockSparseLinear) -> Self:
        """Quantise the live blocks of a layer. The bias is copied.

        Raises:
            KronblocksError: a value is NaN or infinite.
        """
        index = BlockIndex.from_mask(layer.block_mask, layer.positions())
        live = int(index.crow[-1])
        values = layer.values.detach()[index.slot[:live].long()]
        if not values.isfinite().all():
            raise KronblocksError("values that are NaN or infinite cannot become int8: look why the training has diverged")
        has_bias = layer.bias is not None
        sizes = layer.in_features, layer.out_features, layer.grid.block
        new = cls(*sizes, mask=layer.block_mask, bias=has_bias, device=values.device)
        whole, scales = quantized_blocks(values, index.row[:live], layer.grid.shape[0])
        new.values.copy_(whole)
        new.scales.copy_(scales)
        if new.bias is not None and layer.bias is not None:
            new.bias.copy_(layer.bias)
        return new.train(layer.training)

    @torch.no_grad()
    def refresh_index_(self) -> None:
        """Read `block_mask` again, after it has been written to.

        Raises:
            KronblocksError: it has another number of live blocks than `values`.
        """
        live = int(self.block_mask.sum())
        if live != self.capacity:
            raise KronblocksError(f"block_mask has {live} live blocks, but there are values of {self.capacity}")
        for name, tensor in BlockIndex.from_mask(self.block_mask)._asdict().items():
            self._buffers[f"index_{name}"] = tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Also keep what rescales sums in float32, whatever dtype a model is converted to."""
        before = {name: self._buffers[name] for name in ("scales", "bias")}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype is not torch.float32:
                self._buffers[name] = tensor.to(now.device)
        return self

    def forward(self, input: Tensor) -> Tensor:
        if getattr(input, "layout", None) is not torch.strided or input.is_nested:
            return map_unusual(self, input)
        own: Any = self._buffers
        index = BlockIndex(
            own["index_crow"], own["index_col"], own["index_row"], own["index_slot"], own["index_ccol"], own["index_order"]
        )
        return packed_linear_int8(input, own["values"], own["scales"], index, own["bias"])

    @property
    def capacity(self) -> int:
        """Number of live blocks."""
        return self.values.shape[0]

    @property
    def density(self) -> float:
        """Share of the blocks that are live."""
        return self.capacity / self.grid.blocks

    @property
    def weight(self) -> Tensor:
        """The dense weight that the int8 values stand for, (out_features, in_features), built at every use."""
        return weight_of(self.dense_weight, [self.scales, self.values], (self.out_features, self.in_features))

    def dense_weight(self) -> Tensor:
        """Build that weight, float32."""
        live = self.values.float() * self.scales.view(-1, self.grid.block.rows, 1)[self.block_mask.nonzero()[:, 0]]
        blocks = live.new_zeros(*self.grid.shape, *self.grid.block)
        blocks[self.block_mask] = live
        return self.grid.from_blocks(blocks)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, for a structure record."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "block_size": str(self.grid.block)}
        return {**sizes, "capacity": self.capacity, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.grid.block}, "
            f"live={self.capacity}/{self.grid.blocks}, values=int8"
        )


def _after_load(layer: QuantizedBlockLinear, _: object) -> None:
    """A function, not a method, so that layers can be pickled."""
    if not layer.block_mask.is_meta:
        layer.refresh_index_()
