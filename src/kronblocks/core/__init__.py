"""What all rooms use: geometry of blocks, errors, files, checks. It knows no layer and no algorithm."""

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import (
    KronblocksError,
    KronblocksWarning,
    NativeFallbackWarning,
    OpenMPConflictWarning,
    PerformanceWarning,
)

__all__ = [
    "BlockGrid",
    "BlockSize",
    "KronblocksError",
    "KronblocksWarning",
    "NativeFallbackWarning",
    "OpenMPConflictWarning",
    "PerformanceWarning",
]
