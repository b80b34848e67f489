"""What the layers are compared with: block-sparse products of other libraries, and the Kronecker layer as its authors write it.

All compute y = x W^T + bias for the same W. The others' products are made once, outside the timing, in the format they want.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks import KroneckerBlockLinear
from kronblocks.ops import BlockGrid

Product = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A peer cannot compute this product; says why."""


def tried(product: Product, x: Tensor) -> None:
    """Call a product once.

    Raises:
        Unavailable: its library has none for this device, dtype, block size or number of rows.
    """
    try:
        product(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # each library has its own
        raise Unavailable(str(error).strip().partition("\n")[0] or type(error).__name__) from error


def torch_bsr(weight: Tensor, grid: BlockGrid) -> Tensor:
    """A weight as a torch tensor in BSR layout.

    Raises:
        Unavailable: torch multiplies with square blocks only.
    """
    if weight.device.type == "cpu" and grid.block.rows != grid.block.cols:
        raise Unavailable("torch's BSR products on a CPU, which are MKL's, accept square blocks only")
    with warnings.catch_warnings():  # the layout is in beta, and says so
        warnings.filterwarnings("ignore", message="Sparse (BSR|CSR) tensor support")
        return weight.to_sparse_bsr(tuple(grid.block))


def bsr_linear(weight: Tensor, bias: Tensor, grid: BlockGrid) -> Product:
    """torch BSR through `nn.functional.linear`."""
    sparse = torch_bsr(weight, grid)
    return lambda x: nn.functional.linear(x, sparse, bias)


def bsr_product(weight: Tensor, bias: Tensor, grid: BlockGrid) -> Product:
    """torch BSR as `W @ x.T`, which is a faster way through the same library."""
    sparse = torch_bsr(weight, grid)
    return lambda x: (sparse @ x.t()).t() + bias


def scipy_bsr(weight: Tensor, bias: Tensor, grid: BlockGrid) -> Product:
    """SciPy's BSR, on one thread, since it has no more.

    Raises:
        Unavailable: the weight is not on the CPU.
    """
    if weight.device.type != "cpu" or weight.dtype == torch.bfloat16:
        raise Unavailable("SciPy computes on the CPU only, and not in bf16")
    from scipy import sparse

    matrix = sparse.bsr_array(weight.numpy(), blocksize=tuple(grid.block))
    added = bias.unsqueeze(1).numpy()
    return lambda x: torch.from_numpy((matrix @ x.numpy().T + added).T)


def has_fastkron() -> bool:
    """Whether pyfastkron is installed; it is not imported, since that starts threads of its own."""
    return importlib.util.find_spec("pyfastkron") is not None


def fastkron(layer: KroneckerBlockLinear) -> Product:
    """pyfastkron's product with one Kronecker product, x (A kron B)^T.

    Raises:
        Unavailable: it is not installed, or cannot multiply with this weight.
    """
    if not has_fastkron():
        raise Unavailable("pyfastkron is not installed")
    if layer.rank != 1 or layer.tile_groups != 1:
        raise Unavailable("pyfastkron multiplies with one Kronecker product, rank 1 and one bank of tiles")
    module: Any = importlib.import_module("pyfastkron.fastkrontorch")
    factors = [factor.detach().t().contiguous() for factor in (layer.effective_coeff()[:, :, 0], layer.tiles[0, 0])]
    assert layer.bias is not None
    bias = layer.bias.detach()
    return lambda x: module.gemkm(x, factors) + bias


class AuthorsLayer(nn.Module):
    """The paper's layer with its parameters S, A and B, in plain PyTorch and autograd, in our own words.

    Args:
        layer: one bank of tiles; its coefficients become A, its mask S.

    Source:
        Zhu, Zuo, Khalili, TMLR 2025, section 3.
    """

    def __init__(self, layer: KroneckerBlockLinear) -> None:
        super().__init__()
        assert layer.tile_groups == 1 and layer.bias is not None
        with torch.no_grad():
            self.s = nn.Parameter(layer.block_mask.to(layer.coeff.dtype))  # (m1, n1)
            self.a = nn.Parameter(layer.effective_coeff().permute(2, 0, 1).contiguous())  # (r, m1, n1)
            self.b = nn.Parameter(layer.tiles[0].clone())  # (r, bm, bn)
            self.bias = nn.Parameter(layer.bias.clone())

    def dense_weight(self) -> Tensor:
        """W = sum_i (S * A_i) kron B_i."""
        weight = torch.einsum("ipq,iab->paqb", self.s * self.a, self.b)
        return weight.reshape(weight.shape[0] * weight.shape[1], -1)


class BuildWeight(AuthorsLayer):
    """Build W at every call, then one dense product."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(), self.bias)


class TwoProducts(AuthorsLayer):
    """The tiles on the blocks of x, and the coefficients on what comes out, which autograd keeps for backward."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.einsum("tqb,iab->tiqa", x.unflatten(1, (self.s.shape[1], -1)), self.b)
        return torch.einsum("ipq,tiqa->tpa", self.s * self.a, z).flatten(1) + self.bias


class LoopOverTerms(AuthorsLayer):
    """The same, one term after the other."""

    def forward(self, x: Tensor) -> Tensor:
        blocks, coeff = x.unflatten(1, (self.s.shape[1], -1)), self.s * self.a
        y = coeff[0] @ (blocks @ self.b[0].t())
        for a, b in zip(coeff[1:], self.b[1:], strict=True):
            y = y + a @ (blocks @ b.t())
        return y.flatten(1) + self.bias


def authors_macs(form: type[AuthorsLayer], grid: BlockGrid, rank: int, rows: int) -> int:
    """Multiply-adds of a forward pass; backward takes twice as many."""
    if form is BuildWeight:
        return (rank + rows) * grid.weights
    return rows * rank * (grid.in_features * grid.block.rows + grid.weights // grid.block.cols)


def group_lasso(weight: Tensor, grid: BlockGrid) -> Tensor:
    """The group LASSO penalty of a dense weight: the mean over its blocks of their norm / sqrt(area)."""
    norms = torch.linalg.vector_norm(grid.to_blocks(weight), dim=(2, 3))
    return norms.mean() / math.sqrt(grid.block.area)
