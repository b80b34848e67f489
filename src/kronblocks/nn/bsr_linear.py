"""A finished linear layer on torch's own block-sparse (BSR) products."""

from __future__ import annotations

import warnings
from typing import Self

import torch
from torch import Tensor

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.built import weight_of
from kronblocks.nn.loading import WholeWeights
from kronblocks.ops.operands import check_tensor


class BsrLinear(WholeWeights):
    """y = x W^T + bias with W in torch's BSR layout, for inference; see `torch.sparse_bsr_tensor`.

    Buffers: `crow` (m1 + 1,), `col` (live,), `values` (live, b, b), `bias` (m,) or None.

    Args:
        weight: (m, n), BSR.
        bias: (m,).

    Raises:
        KronblocksError: the blocks are not square, and the device is a CPU, where MKL needs square ones.
    """

    crow: Tensor
    col: Tensor
    values: Tensor
    bias: Tensor | None

    active_plan = "packed"  # not by a dense weight: a convolution gives it rows

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rows, cols = weight.values().shape[1:]
        if weight.device.type == "cpu" and rows != cols:
            raise KronblocksError(
                f"torch's BSR products on a CPU need square blocks, not {rows}x{cols}: export with form='packed' instead"
            )
        self.register_buffer("crow", weight.crow_indices())
        self.register_buffer("col", weight.col_indices())
        self.register_buffer("values", weight.values())
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_block_sparse(cls, layer: BlockSparseLinear) -> Self:
        """Make a layer of the live blocks of another one."""
        return cls(layer.to_torch_bsr(), layer.bias)

    @property
    def weight(self) -> Tensor:
        """The weight in BSR layout, (m, n)."""
        return weight_of(self._bsr, [self.values], (self.out_features, self.in_features))

    def _bsr(self) -> Tensor:
        with warnings.catch_warnings():  # torch warns once per process that BSR is in beta
            warnings.filterwarnings("ignore", message="Sparse BSR tensor support")
            size = (self.out_features, self.in_features)
            return torch.sparse_bsr_tensor(self.crow, self.col, self.values, size, check_invariants=False)

    def forward(self, input: Tensor) -> Tensor:
        check_tensor(input)
        y = (self._bsr() @ input.reshape(-1, self.in_features).t()).t().reshape(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        live, rows, cols = self.values.shape
        return f"in_features={self.in_features}, out_features={self.out_features}, block_size={rows}x{cols}, live={live}"
