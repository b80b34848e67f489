"""What a rule sees and gives: grids in, grids out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kronblocks.algorithms.budget import FLOOR, Scope, blocks_to_kill, choose_dead, keep_longest, layer_adaptive
from kronblocks.algorithms.schedule import Phase
from kronblocks.algorithms.targets import BlockTarget, Score
from kronblocks.core.checks import one_of
from kronblocks.core.errors import KronblocksError

Form = Literal["gradient", "proximal"]
Strength = float | Literal["scheduled"]
RuleState = dict[str, Any]


@dataclass(frozen=True)
class RuleContext:
    """What a rule may know beside the scores."""

    step: int
    total_steps: int
    phase: Phase
    sparsity: float  # wanted after this step
    target_sparsity: float
    fraction: float  # of the pruning span that has passed
    is_update: bool  # whether the mask is due
    is_last_update: bool  # whether this is the update after which the mask is frozen
    next_sparsity: float  # wanted after the next mask update
    steps_to_update: int  # until then, at least 1
    masks: tuple[Tensor, ...]  # (m1, n1) bool a layer, True = live
    areas: tuple[int, ...]  # weights per block, a number a layer
    learning_rates: tuple[float, ...]  # a number a layer; 1 where the optimiser sets its own steps
    heads: tuple[bool, ...] = ()  # whether a layer makes the model's output, so that each of its block rows keeps a block
    scope: Scope = "global"
    score: Score = "norm"  # what the scores are

    @property
    def floor(self) -> float:
        """Share of the mean density that every layer keeps, unless blocks are scored by the loss."""
        return 0.0 if self.scope == "layer" or self.score == "taylor" else FLOOR


class Rule(Protocol):
    """One algorithm: a pure function on grids, and a penalty for the forms that live in the loss.

    Subclass it for an algorithm of your own, and give `sparsify_` one as `rule=`.

    Args:
        score: what `propose` gets of each block: "norm" (its norm / sqrt(area)), "gate" (|S|) or "taylor" (gradient times
            weight). Norms are in the unit of their own layer: to compare blocks of several layers, leave it to `cut`, or
            use `kronblocks.algorithms.budget.layer_adaptive`.
        every_step: `propose` is wanted after every step of the pruning span, not only at mask updates.
        needs_growth: growth scores, the norms of the gradients of all blocks, are measured on the way to each mask update.
        has_penalty: `penalty` is wanted at every step.
    """

    score: Score = "norm"
    every_step: bool = False
    needs_growth: bool = False
    has_penalty: bool = False

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        """A mask a layer, (m1, n1) bool, True = live, or a number a block where blocks shrink; and the new state.

        0 kills a block or leaves it dead; another number scales it, and brings a dead one back, at zero. Neither `scores` nor
        `state` is changed. The state is a dict of plain values and tensors, empty at first, and is saved with the sparsifier's.
        """
        ...

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        """A differentiable term for the loss, or None."""
        return None


def check_rule(rule: Any) -> None:
    """Refuse what is no rule.

    Raises:
        KronblocksError: it says what is missing.
    """
    if isinstance(rule, type):
        raise KronblocksError(f"rule={rule.__name__} is a class: write rule={rule.__name__}(...)")
    wanted = ("propose", "penalty", "score", "every_step", "needs_growth", "has_penalty")
    if missing := [name for name in wanted if not hasattr(rule, name)]:
        raise KronblocksError(f"rule={type(rule).__name__} has no {', '.join(missing)}: make it a subclass of kronblocks.Rule")
    one_of(f"{type(rule).__name__}.score", rule.score, Score)


def checked(answer: Any, rule: Rule, ctx: RuleContext) -> tuple[Sequence[Tensor], RuleState]:
    """What `propose` gave, grids and state.

    Raises:
        KronblocksError: it must not give that; says what it should give.
    """
    name, wanted = f"{type(rule).__name__}.propose", [tuple(mask.shape) for mask in ctx.masks]
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], Mapping):
        raise KronblocksError(f"{name} gave {type(answer).__name__}: return (grids, state), a list of tensors and a dict")
    grids, state = answer
    if not isinstance(grids, Sequence) or not all(isinstance(each, Tensor) for each in grids):
        raise KronblocksError(f"{name} gave no list of tensors: return (grids, state), a tensor for each layer")
    if (given := [tuple(each.shape) for each in grids]) != wanted:
        raise KronblocksError(f"{name} gave grids of {given}: give a bool or a number for each block, in grids of {wanted}")
    for each in grids:
        if each.dtype != torch.bool and (each.is_complex() or not bool((torch.isfinite(each) & (each >= 0)).all())):
            raise KronblocksError(f"{name} gave numbers that are not finite, or below 0: blocks are multiplied by them")
    return grids, dict(state)


def ranked(scores: Sequence[Tensor], ctx: RuleContext) -> list[Tensor]:
    """Scores that compare blocks of all layers, -1 for dead ones: norms freed of their layer's scale, others as they are.

    Args:
        scores: one (m1, n1) grid a layer, from 0 on.
        ctx: what the rule was given.
    """
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    return layer_adaptive(live) if ctx.score == "norm" and ctx.scope == "global" else live


def cut(scores: Sequence[Tensor], ctx: RuleContext, sparsity: float) -> list[Tensor]:
    """Masks, (m1, n1) bool, without the blocks of least score, so that exactly `sparsity` are dead; the dead stay dead.

    Scores of a rule whose `score` is "norm" are compared within their layers first (`layer_adaptive`), so a layer's scale
    counts for nothing. Those of "gate" and "taylor" rules are compared as they are.

    Args:
        scores: one (m1, n1) grid a layer, from 0 on.
        ctx: what the rule was given.
        sparsity: share to be dead, such as `ctx.sparsity`.

    Raises:
        KronblocksError: a live block's score is below 0 or not a number.
    """
    if not all(((score >= 0) | ~mask).all() for score, mask in zip(scores, ctx.masks, strict=True)):
        raise KronblocksError("cut wants scores from 0 on for live blocks, and no NaN among them: shift them, or take exp()")
    dead = choose_dead(ranked(scores, ctx), ctx.areas, sparsity, ctx.scope, heads=ctx.heads, floor=ctx.floor)
    return [mask & ~each for mask, each in zip(ctx.masks, dead, strict=True)]


def _stays_within(multipliers: Sequence[Tensor], ctx: RuleContext, sparsity_cap: float) -> bool:
    """Whether no more die than may; for layers of unequal blocks it may say no where one block of rounding up is the reason."""
    dead = [int((m == 0).sum()) for m in multipliers]
    blocks = [m.numel() for m in multipliers]
    if any(d == b for d, b in zip(dead, blocks, strict=True)):
        return False
    if ctx.scope == "layer":
        return all(d <= blocks_to_kill(b, sparsity_cap) for d, b in zip(dead, blocks, strict=True))
    if len(set(ctx.areas)) == 1:
        return sum(dead) <= blocks_to_kill(sum(blocks), sparsity_cap)
    dead_weights, weights = (sum(n * area for n, area in zip(counts, ctx.areas, strict=True)) for counts in (dead, blocks))
    return dead_weights <= sparsity_cap * weights


def shrink(scores: Sequence[Tensor], thresholds: Sequence[float], ctx: RuleContext, sparsity_cap: float) -> list[Tensor]:
    """The proximal step max(0, 1 - threshold/score) (equation 14), which never kills more than `sparsity_cap` of all.

    Blocks that would die beyond the cap are left alone, and so are those that are to be kept longest (`keep_longest`), so that
    the target can be hit exactly.
    """
    multipliers = []
    for score, threshold, mask in zip(scores, thresholds, ctx.masks, strict=True):
        multiplier = (1 - threshold / score.clamp_min(torch.finfo(score.dtype).tiny)).clamp_min(0)
        dies = ~mask | (score <= threshold) if threshold > 0 else ~mask  # of equal ones the quotient may round to below 1
        multipliers.append(multiplier.masked_fill(dies, 0))
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    for place, late in enumerate(keep_longest(live, sparsity_cap, heads=ctx.heads, floor=ctx.floor)):
        multipliers[place] = multipliers[place].masked_fill((late > 0) & (multipliers[place] == 0), 1.0)
    if _stays_within(multipliers, ctx, sparsity_cap):
        return multipliers
    allowed = cut(scores, ctx, sparsity_cap)
    return [torch.where((m == 0) & keep, 1.0, m) for m, keep in zip(multipliers, allowed, strict=True)]
