"""Layers: parameters and one call into `kronblocks.ops`."""

from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear

__all__ = [
    "BlockMixtureLinear",
    "BlockSparseLinear",
    "KroneckerBlockLinear",
    "QuantizedBlockLinear",
]
