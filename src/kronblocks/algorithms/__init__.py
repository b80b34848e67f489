"""Algorithms on grids of block scores: rules, budgets and schedules. `training` ties them to an optimiser."""

from kronblocks.algorithms.rules.base import Rule, RuleContext, cut
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.distillation import Distillation
from kronblocks.algorithms.training.report import SparsityReport
from kronblocks.algorithms.training.sparsifier import Sparsifier

__all__ = [
    "BlockTarget",
    "Distillation",
    "Rule",
    "RuleContext",
    "Sparsifier",
    "SparsityReport",
    "SparsitySchedule",
    "cut",
]
