"""Layers: parameters and one call into `kronblocks.ops`."""

from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.mixture import BlockMixtureLinear

__all__ = [
    "BlockMixtureLinear",
    "BlockSparseLinear",
    "KroneckerBlockLinear",
]
