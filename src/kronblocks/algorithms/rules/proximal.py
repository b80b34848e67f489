"""What penalised rules share: a shrink after every step that keeps to the schedule, a growing term in the loss, an exact cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.algorithms.budget import choose_dead, keep_longest
from kronblocks.algorithms.rules.base import RuleContext, RuleState, Strength, cut, ranked, shrink


def blocks_due(scores: Sequence[Tensor], ctx: RuleContext) -> list[int]:
    """How many blocks of each layer are to be dead at the next mask update; none of a layer whose learning rate alone is 0.

    Args:
        scores: (m1, n1) grids.
        ctx: what the rule may know. The sparsity is that of the layers that move, all together.
    """
    still = not any(ctx.learning_rates)  # a schedule may begin or end with rates of 0 for all
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
    """What to shrink each layer's scores by now, so that many of its blocks are dead in time (equation 18 in docs/math.md).

    Asked at every step, this makes up for what the loss pushes back, and rests once enough blocks are dead. Learning rates do not
    matter.

    Args:
        scores: (m1, n1) grids.
        due: blocks of each layer that are to be dead at the next mask update.
        ctx: what the rule may know.
    """
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    late = keep_longest(live, ctx.next_sparsity, heads=ctx.heads, floor=ctx.floor)
    last = []
    for score, stays, number in zip(live, late, due, strict=True):
        dying = score.clamp_min(0).masked_fill(stays > 0, -1.0).flatten()
        order = dying.sort().values  # those that stay come first
        place = min(int((stays > 0).sum()) + number, len(order)) - 1
        last.append(order[place].clamp_min(0) if number else order.new_zeros(()))
    thresholds = torch.stack([each.to(last[0]) for each in last]) / ctx.steps_to_update
    return thresholds.tolist()


def proximal_step(
    scores: Sequence[Tensor], ctx: RuleContext, state: RuleState, strength: Strength, *, ridge: float = 0.0
) -> tuple[list[Tensor], RuleState]:
    """Shrink all blocks by a threshold; the last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        ctx: what the rule may know.
        state: how many blocks of each layer are due at the next mask update, from the last one on.
        strength: a fixed penalty: the threshold is that times the learning rate, and no more than the target die. "scheduled":
            the thresholds that the schedule wants, and no more than that die.
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


def cut_at_the_end(scores: Sequence[Tensor], ctx: RuleContext) -> list[Tensor]:
    """Masks for penalties in the loss, which make no exact zeros: only the last update kills, and cuts to the target."""
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity)
    return list(ctx.masks)


def growing_strength(strength: Strength, growth: float, ctx: RuleContext) -> float:
    """Weight of a penalty in the loss: it grows linearly over the training to `growth` times its first value."""
    assert strength != "scheduled"
    return strength * (1 + (growth - 1) * ctx.step / ctx.total_steps)
