"""What penalised rules share: a shrink after every step that keeps to the schedule, a growing term in the loss, an exact cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.sparsity.rules.base import RuleContext, cut, shrink


def last_to_die(scores: Sequence[Tensor], masks: Sequence[Tensor], areas: Sequence[int], sparsity: float) -> float:
    """Score of the last block that has to die for a sparsity; 0 where enough are dead.

    >>> last_to_die([torch.tensor([[4.0, 1.0, 3.0, 2.0]])], [torch.tensor([[True, True, False, True]])], [1], 0.5)
    1.0
    """
    parts = zip(scores, masks, areas, strict=True)
    live, sizes = zip(*[(s.masked_fill(~m, 0), torch.full((s.numel(),), area)) for s, m, area in parts], strict=True)
    flat, weights = torch.cat([score.flatten().cpu().double() for score in live]), torch.cat(sizes).double()
    ordered, order = flat.sort()
    wanted = sparsity * float(weights.sum())
    if wanted <= 0:
        return 0.0
    return float(ordered[int((weights[order].cumsum(0) >= wanted * (1 - 1e-12)).int().argmax())])


def _due_thresholds(scores: Sequence[Tensor], ctx: RuleContext) -> list[float]:
    """What to shrink each layer's scores by now, for the sparsity that the next mask update wants (equation 18 in docs/math.md).

    Asked at every step, this makes up for what the loss pushes back, and rests once enough blocks are dead. How the learning rate
    goes over the steps does not matter, only how layers' rates compare.
    """
    layers = zip(scores, ctx.masks, ctx.areas, strict=True)
    if ctx.scope == "layer":
        due = [last_to_die([score], [mask], [area], ctx.next_sparsity) for score, mask, area in layers]
    else:
        due = [last_to_die(scores, ctx.masks, ctx.areas, ctx.next_sparsity)] * len(scores)
    mean = sum(ctx.learning_rates) / len(ctx.learning_rates)
    shares = [rate / mean if mean > 0 else 1.0 for rate in ctx.learning_rates]
    return [score / ctx.steps_to_update * share for score, share in zip(due, shares, strict=True)]


def proximal_step(scores: Sequence[Tensor], ctx: RuleContext, strength: float | None, *, ridge: float = 0.0) -> list[Tensor]:
    """Shrink all blocks by a threshold; the last update cuts to the target exactly.

    Args:
        scores: (m1, n1) grids.
        ctx: what the rule may know.
        strength: a fixed penalty: the threshold is that times the learning rate, and no more than the target die. None: the
            thresholds that the schedule wants, and no more than that die.
        ridge: penalty on half the squared norm, relative to that on the norm.
    """
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity)
    if strength is None:
        thresholds, cap = _due_thresholds(scores, ctx), ctx.next_sparsity
    else:
        thresholds, cap = [strength * rate for rate in ctx.learning_rates], ctx.target_sparsity
    multipliers = shrink(scores, thresholds, ctx, cap)
    return [m / (1 + ridge * threshold) for m, threshold in zip(multipliers, thresholds, strict=True)]


def cut_at_the_end(scores: Sequence[Tensor], ctx: RuleContext) -> list[Tensor]:
    """For penalties in the loss, which make no exact zeros: nothing dies before the last update, which cuts to the target."""
    if ctx.is_last_update:
        return cut(scores, ctx, ctx.sparsity)
    return [mask.to(torch.float32) for mask in ctx.masks]


def growing_strength(strength: float | None, growth: float, ctx: RuleContext) -> float:
    """Weight of a penalty in the loss: it grows linearly over the training to `growth` times its first value, 1 unless given."""
    return (1.0 if strength is None else strength) * (1 + (growth - 1) * ctx.step / ctx.total_steps)
