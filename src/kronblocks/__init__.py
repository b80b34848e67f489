"""Neural networks with block-sparse weights, trained that way from the first step.

A training script needs three more lines: `sparsify_` the model, make the optimiser, `attach` it. Some methods also have a
`penalty()` to add to the loss. The rooms, from the ground up, are `core`, `ops`, `nn` and `algorithms`, `config`, `surgery`,
then `search`, `deploy` and `advice`, and `integrations`. Each says in its `__init__` what it offers.
"""

import importlib
import sys
import warnings
from typing import Any

from kronblocks.advice import advise
from kronblocks.algorithms import Distillation, Rule, Sparsifier
from kronblocks.config import LayerOverride, PenaltyConfig, ScheduleConfig, SparsityConfig
from kronblocks.core import KronblocksError, KronblocksWarning
from kronblocks.deploy import export, from_pretrained, push_to_hub, rebuild_on_load_, save_pretrained
from kronblocks.integrations.doors import open_doors
from kronblocks.nn import BlockSparseLinear, KroneckerBlockLinear
from kronblocks.search import SearchTask, find_block_size
from kronblocks.surgery import densify_, parameter_groups, sparsify_

__version__ = "0.1.0"

__all__ = [
    "BlockSparseLinear",
    "Distillation",
    "KronblocksError",
    "KronblocksWarning",
    "KroneckerBlockLinear",
    "LayerOverride",
    "PenaltyConfig",
    "Rule",
    "ScheduleConfig",
    "SearchTask",
    "Sparsifier",
    "SparsityConfig",
    "advise",
    "densify_",
    "export",
    "find_block_size",
    "from_pretrained",
    "parameter_groups",
    "push_to_hub",
    "rebuild_on_load_",
    "save_pretrained",
    "sparsify_",
]

open_doors()

_ROOM_OF = {  # names that were here in 0.1, and the room that has them
    **dict.fromkeys(
        (
            "BlockGrid",
            "BlockIndex",
            "BlockSize",
            "Cost",
            "PlanChoice",
            "Problem",
            "block_norms",
            "canonical_form",
            "choose_plan",
            "cost",
            "kron_linear",
            "kron_weight",
            "nearest_kronecker_sum",
            "packed_linear",
        ),
        "kronblocks.ops",
    ),
    "BlockMixtureLinear": "kronblocks.nn",
    **dict.fromkeys(("MixtureConfig", "SearchConfig", "SearchReport", "find_block_size_in_mixture_"), "kronblocks.search"),
    **dict.fromkeys(("SurgeryReport", "apply_structure_", "lift_", "rewind_", "select", "structure"), "kronblocks.surgery"),
    "RankChoice": "kronblocks.config",
    **dict.fromkeys(("BlockTarget", "RuleContext", "SparsityReport", "SparsitySchedule"), "kronblocks.algorithms"),
    "Exported": "kronblocks.deploy",
    "Advice": "kronblocks.advice",
    **dict.fromkeys(("NativeFallbackWarning", "OpenMPConflictWarning", "PerformanceWarning"), "kronblocks.core"),
}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'kronblocks' has no attribute {name!r}")
    room = _ROOM_OF[name]
    if sys._getframe(1).f_globals.get("__name__") != "importlib._bootstrap":  # `from kronblocks import name` asks there first
        warnings.warn(f"kronblocks.{name} moves: write `from {room} import {name}`", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(room), name)
