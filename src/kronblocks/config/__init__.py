"""What a user sets: `SparsityConfig` and its parts, and the table of methods."""

from kronblocks.config.methods import MethodSpec, register_method
from kronblocks.config.parts import LayerOverride, PenaltyConfig, ScheduleConfig
from kronblocks.config.ranks import RankChoice
from kronblocks.config.sparsity import SparsityConfig

__all__ = [
    "LayerOverride",
    "MethodSpec",
    "PenaltyConfig",
    "RankChoice",
    "ScheduleConfig",
    "SparsityConfig",
    "register_method",
]
