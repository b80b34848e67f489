"""Neural networks with block-sparse weights, trained that way from the first step.

Three lines in a training script: `sparsify_` the model, `attach` the optimiser that is made after it, add `penalty()` to
the loss.
"""

from kronblocks.advice import Advice
from kronblocks.advise import advise
from kronblocks.blocks import BlockGrid, BlockSize
from kronblocks.config import LayerOverride, PenaltyConfig, ScheduleConfig, SparsityConfig
from kronblocks.distillation import Distillation
from kronblocks.errors import KronblocksError, KronblocksWarning, NativeFallbackWarning, OpenMPConflictWarning, PerformanceWarning
from kronblocks.export import Exported, export
from kronblocks.groups import parameter_groups
from kronblocks.lifting import lift_
from kronblocks.loading import rebuild_on_load_
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.mixture import BlockMixtureLinear
from kronblocks.ops.choice import PlanChoice, choose_plan
from kronblocks.ops.cost import Cost, cost
from kronblocks.ops.index import BlockIndex
from kronblocks.ops.kron import block_norms, kron_linear, kron_weight
from kronblocks.ops.nearest import canonical_form, nearest_kronecker_sum
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.problem import Problem
from kronblocks.ranks import RankChoice
from kronblocks.records import apply_structure_, structure
from kronblocks.rewinding import rewind_
from kronblocks.saving import from_pretrained, save_pretrained
from kronblocks.search.halving import SearchConfig, find_block_size
from kronblocks.search.mixture import MixtureConfig, find_block_size_in_mixture_
from kronblocks.search.report import SearchReport
from kronblocks.search.task import SearchTask
from kronblocks.selected import SurgeryReport
from kronblocks.selection import select
from kronblocks.sparsity.report import SparsityReport
from kronblocks.sparsity.rules.base import Rule, RuleContext
from kronblocks.sparsity.schedule import SparsitySchedule
from kronblocks.sparsity.sparsifier import Sparsifier
from kronblocks.sparsity.targets import BlockTarget
from kronblocks.surgery import densify_, sparsify_

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "BlockGrid",
    "BlockIndex",
    "BlockMixtureLinear",
    "BlockSize",
    "BlockSparseLinear",
    "BlockTarget",
    "Cost",
    "Distillation",
    "Exported",
    "KronblocksError",
    "KronblocksWarning",
    "KroneckerBlockLinear",
    "LayerOverride",
    "MixtureConfig",
    "NativeFallbackWarning",
    "OpenMPConflictWarning",
    "PenaltyConfig",
    "PerformanceWarning",
    "PlanChoice",
    "Problem",
    "RankChoice",
    "Rule",
    "RuleContext",
    "ScheduleConfig",
    "SearchConfig",
    "SearchReport",
    "SearchTask",
    "Sparsifier",
    "SparsityConfig",
    "SparsityReport",
    "SparsitySchedule",
    "SurgeryReport",
    "advise",
    "apply_structure_",
    "block_norms",
    "canonical_form",
    "choose_plan",
    "cost",
    "densify_",
    "export",
    "find_block_size",
    "find_block_size_in_mixture_",
    "from_pretrained",
    "kron_linear",
    "kron_weight",
    "lift_",
    "nearest_kronecker_sum",
    "packed_linear",
    "parameter_groups",
    "rebuild_on_load_",
    "rewind_",
    "save_pretrained",
    "select",
    "sparsify_",
    "structure",
]
