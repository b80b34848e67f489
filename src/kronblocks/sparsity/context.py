"""What a rule is told beside the scores, from the schedule and the layers as they are."""

from __future__ import annotations

from collections.abc import Sequence

from kronblocks.sparsity.budget import Scope
from kronblocks.sparsity.rules.base import RuleContext
from kronblocks.sparsity.schedule import SparsitySchedule
from kronblocks.sparsity.targets import BlockTarget


def context_at(
    step: int, schedule: SparsitySchedule, targets: Sequence[BlockTarget], learning_rates: tuple[float, ...], scope: Scope
) -> RuleContext:
    """The context after a step.

    Args:
        step: finished optimiser steps.
        schedule: of the training.
        targets: the layers.
        learning_rates: a number a layer.
        scope: of the budget.
    """
    later = schedule.next_update(step)
    return RuleContext(
        step=step,
        total_steps=schedule.total_steps,
        phase=schedule.phase_at(step),
        sparsity=schedule.sparsity_at(step),
        target_sparsity=schedule.target_sparsity,
        fraction=schedule.fraction_at(step),
        is_update=schedule.is_update(step),
        is_last_update=step == schedule.end_step,
        next_sparsity=schedule.sparsity_at(later),
        steps_to_update=max(1, later - step),
        masks=tuple(target.mask for target in targets),
        areas=tuple(target.area for target in targets),
        learning_rates=learning_rates,
        scope=scope,
    )
