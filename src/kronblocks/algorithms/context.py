"""Make the context that a rule gets beside the scores, from the schedule, the layers and the optimisers."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from kronblocks.algorithms.budget import Scope
from kronblocks.algorithms.rules.base import Rule, RuleContext
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.targets import BlockTarget, Score


def score_of(rule: Rule, targets: Sequence[BlockTarget]) -> Score:
    """How blocks are compared now: the rule's score, but norms after a lift, since free values have no gates."""
    lifted = not all(target.is_factored for target in targets)
    return "norm" if lifted and rule.score == "gate" else rule.score


def context_at(
    step: int,
    schedule: SparsitySchedule,
    targets: Sequence[BlockTarget],
    optimizers: Sequence[Optimizer],
    *,
    heads: Sequence[str],
    scope: Scope,
    score: Score,
) -> RuleContext:
    """The context after a step.

    Args:
        step: finished optimiser steps.
        schedule: of the training.
        targets: the layers.
        optimizers: those that hold the layers' parameters.
        heads: names of the layers that make the output.
        scope: one budget ("global"), or one per layer ("layer").
        score: the kind of scores that the rule gets.
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
        learning_rates=learning_rates(targets, optimizers),
        heads=tuple(target.name in heads for target in targets),
        scope=scope,
        score=score,
    )


def learning_rates(targets: Sequence[BlockTarget], optimizers: Sequence[Optimizer]) -> tuple[float, ...]:
    """The learning rate of each layer: 1 if its optimiser has no rates, 0 if no optimiser holds it."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rate = {id(p): 1.0 if group.get("lr") is None else float(group["lr"]) for group in groups for p in group["params"]}
    return tuple(rate.get(id(target.parameters()[0]), 0.0) for target in targets)
