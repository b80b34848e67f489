"""What penalised rules share: a shrink after every step that keeps to the schedule, a growing term in the loss, an exact cut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kronblocks.sparsity.budget import best_of_rows, blocks_to_kill
from kronblocks.sparsity.rules.base import RuleContext, cut, shrink


def last_to_die(scores: Sequence[Tensor], areas: Sequence[int], sparsity: float) -> float:
    """Score of the last block that has to die for a sparsity; 0 where enough are dead, and so have that score.

    Args:
        scores: grids, in which blocks that cannot die are infinite.
        areas: weights per block, a number a grid.
        sparsity: share of all weights that is to be dead.

    >>> last_to_die([torch.tensor([[4.0, 1.0, 0.0, 2.0]])], [1], 0.5), last_to_die([torch.tensor([[0.0, torch.inf]])], [1], 0.9)
    (1.0, 0.0)
    """
    flat = torch.cat([score.flatten().to(scores[0].device) for score in scores])
    alike = len(set(areas)) == 1  # then blocks are counted, else their weights
    sizes = [1 if alike else area for area in areas]
    due = blocks_to_kill(sum(score.numel() * size for score, size in zip(scores, sizes, strict=True)), sparsity)
    if due == 0:
        return 0.0
    if alike and flat.device.type == "cpu":  # asked at every step, so without sorting where that can be
        last = flat.kthvalue(due).values
    else:
        device = flat.device
        weights = torch.cat([torch.full((s.numel(),), size, device=device) for s, size in zip(scores, sizes, strict=True)])
        ordered, order = flat.sort()
        last = ordered[(weights[order].cumsum(0) >= due).int().argmax()]
    if torch.isinf(last):  # then all that can die has to
        last = flat.masked_fill(flat.isinf(), 0).max()
    return float(last)


def _due_thresholds(scores: Sequence[Tensor], ctx: RuleContext) -> list[float]:
    """What to shrink each layer's scores by now, for the sparsity that the next mask update wants (equation 18 in docs/math.md).

    Asked at every step, this makes up for what the loss pushes back, and rests once enough blocks are dead. How the learning rate
    goes over the steps does not matter, only how layers' rates compare; layers without any stay as they are until the last cut.
    """
    highest = max(ctx.learning_rates)
    rates = [rate / highest if highest > 0 else 1.0 for rate in ctx.learning_rates]
    killable = _with_infinite_stays(scores, ctx.masks)
    moving = [number for number, rate in enumerate(rates) if rate > 0]
    groups = [[number] for number in moving] if ctx.scope == "layer" else [moving]
    thresholds = [0.0] * len(scores)
    for group in groups:
        per_rate = [killable[number] / rates[number] for number in group]
        penalty = last_to_die(per_rate, [ctx.areas[number] for number in group], ctx.next_sparsity) / ctx.steps_to_update
        for number in group:
            thresholds[number] = penalty * rates[number]
    return thresholds


def _with_infinite_stays(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """Scores, 0 where blocks are dead, infinite where no shrink kills them: the best of a layer, of a block row of the last."""
    live = [score.masked_fill(~mask, 0).contiguous() for score, mask in zip(scores, masks, strict=True)]
    in_head = best_of_rows(live[-1]) & masks[-1]
    for score in live:
        score.view(-1)[score.argmax()] = torch.inf
    live[-1].masked_fill_(in_head, torch.inf)
    return live


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
        if not any(thresholds):
            return [mask.to(torch.float32) for mask in ctx.masks]
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
