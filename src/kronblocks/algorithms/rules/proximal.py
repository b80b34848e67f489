"""Penalised: what penalised rules share. Shrinking by the schedule after every step, a growing term in the loss, an exact cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.algorithms.budget import choose_dead, keep_longest
from kronblocks.algorithms.rules.base import Form, Rule, RuleContext, RuleState, Strength, cut, ranked, shrink
from kronblocks.algorithms.targets import BlockTarget


def blocks_due(scores: Sequence[Tensor], ctx: RuleContext) -> list[int]:
    """How many blocks of each layer must be dead at the next mask update.

    Layers with a learning rate of 0 lose none, unless all have that. The target counts for the other layers together.

    Args:
        scores: (m1, n1) grids.
        ctx: the rule's context.
    """
    still = not any(ctx.learning_rates)  # rates may be 0 for all at the beginning or end
    moving = [number for number, rate in enumerate(ctx.learning_rates) if still or rate > 0]
    compared, due = ranked(scores, ctx), [0] * len(scores)
    heads = [ctx.heads[number] for number in moving] if ctx.heads else ()
    dead = choose_dead(
        *([compared[number] for number in moving], [ctx.areas[number] for number in moving], ctx.next_sparsity, ctx.scope),
        **{"heads": heads, "floor": ctx.floor, "reach": False},
    )
    for number, grid in zip(moving, dead, strict=True):
        due[number] = int(grid.sum())
    return due


def due_thresholds(scores: Sequence[Tensor], due: Sequence[int], ctx: RuleContext) -> list[float]:
    """By how much to shrink each layer's scores now, to have enough dead blocks in time (equation 18 in docs/math.md).

    Computed at every step, it follows what the loss does to blocks, and is 0 once enough are dead. Learning rates do not matter.

    Args:
        scores: (m1, n1) grids.
        due: how many blocks of each layer must be dead at the next mask update.
        ctx: the rule's context.
    """
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    late = keep_longest(live, ctx.next_sparsity, heads=ctx.heads, floor=ctx.floor)
    last = []
    for score, stays, number in zip(live, late, due, strict=True):
        dying = score.clamp_min(0).masked_fill(stays > 0, -1.0).flatten()
        order = dying.sort().values  # blocks that stay come first
        place = min(int((stays > 0).sum()) + number, len(order)) - 1
        last.append(order[place].clamp_min(0) if number else order.new_zeros(()))
    thresholds = torch.stack([each.to(last[0]) for each in last]) / ctx.steps_to_update
    return thresholds.tolist()


def proximal_step(
    scores: Sequence[Tensor], ctx: RuleContext, state: RuleState, strength: Strength, *, ridge: float = 0.0
) -> tuple[list[Tensor], RuleState]:
    """Shrink all blocks by a threshold. The last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        ctx: the rule's context.
        state: how many blocks of each layer are due at the next mask update.
        strength: the threshold is strength times the learning rate, and at most the final target dies. "scheduled": the
            threshold follows the schedule, and at most the sparsity scheduled for the next update dies.
        ridge: penalty on half the squared norm, relative to that on the norm.
    """
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity), {}
    if strength == "scheduled":
        due = state["due"] if "due" in state and not ctx.is_update else blocks_due(scores, ctx)
        state, thresholds, cap = {"due": due}, due_thresholds(scores, due, ctx), ctx.next_sparsity
        if not any(thresholds):
            return list(ctx.masks), state
    else:
        thresholds, cap = [strength * rate for rate in ctx.learning_rates], ctx.target_sparsity
    multipliers = shrink(scores, thresholds, ctx, cap)
    return [m / (1 + ridge * threshold) for m, threshold in zip(multipliers, thresholds, strict=True)], state


class Penalised(Rule):
    """Shrinks blocks, after every step ("proximal") or by a term in the loss ("gradient").

    Args:
        form: "proximal" or "gradient".
        strength: of the penalty. A proximal step shrinks by strength times the learning rate, or, with "scheduled", by what
            the schedule needs (equation 18), whatever the learning rate.
        growth: factor by which the strength in the loss has grown at the end. It grows linearly.
        ridge: strength of the squared score, relative to that of the score.
    """

    def __init__(
        self, form: Form = "proximal", strength: Strength = "scheduled", growth: float = 3.0, *, ridge: float = 0.0
    ) -> None:
        self._strength: Strength = strength
        self._growth, self._ridge = growth, ridge
        self.every_step, self.has_penalty = form == "proximal", form == "gradient"

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        if self.every_step:
            return proximal_step(scores, ctx, state, self._strength, ridge=self._ridge)
        # a penalty in the loss makes no exact zeros: only the last update kills
        return cut(scores, ctx, ctx.sparsity) if ctx.is_last_update else list(ctx.masks), state

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        if not self.has_penalty or ctx.phase == "heal":
            return None
        assert self._strength != "scheduled"
        mean = self.mean_penalty(targets)
        return None if mean is None else self._strength * (1 + (self._growth - 1) * ctx.step / ctx.total_steps) * mean

    def mean_penalty(self, targets: Sequence[BlockTarget]) -> Tensor | None:
        """The differentiable mean over all blocks that is penalised; None: there is nothing to penalise any more."""
        raise NotImplementedError
