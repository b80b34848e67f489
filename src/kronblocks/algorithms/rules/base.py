"""Rule: an algorithm that gets grids of scores and returns grids of decisions, and what rules have in common."""

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
    """What a rule gets beside the scores."""

    step: int
    total_steps: int
    phase: Phase
    sparsity: float  # target after this step
    target_sparsity: float
    fraction: float  # share of the pruning span that has passed
    is_update: bool  # whether this step updates the mask
    is_last_update: bool  # whether this is the update after which the mask is frozen
    next_sparsity: float  # target after the next mask update
    steps_to_update: int  # steps until then, at least 1
    masks: tuple[Tensor, ...]  # (m1, n1) bool per layer, True = live
    areas: tuple[int, ...]  # weights per block, one number per layer
    learning_rates: tuple[float, ...]  # one number per layer; 1 if the optimiser has no rates
    heads: tuple[bool, ...] = ()  # whether a layer makes the model's output, so that each of its block rows keeps a block
    scope: Scope = "global"
    score: Score = "norm"  # what the scores are

    @property
    def floor(self) -> float:
        """Share of the mean density that every layer keeps; 0 with one budget per layer, or scores by the loss."""
        return 0.0 if self.scope == "layer" or self.score == "taylor" else FLOOR


class Rule(Protocol):
    """One algorithm: a pure function on grids (`propose`), and perhaps a term for the loss (`penalty`).

    For an algorithm of your own, write a subclass and pass an instance to `sparsify_` as `rule=`.

    Args:
        score: what `propose` gets for each block: "norm" (its norm / sqrt(area)), "relative" (that, relative to its block row
            and column), "gate" (|S|) or "taylor" (gradient times weight). Norms of different layers are not comparable: `cut`
            and `budget.layer_adaptive` rescale them.
        every_step: call `propose` after every step of the pruning span, not only at mask updates.
        needs_growth: measure growth scores, the gradient norms of all blocks, before each mask update.
        has_penalty: `penalty` adds to the loss at every step.
    """

    score: Score = "norm"
    every_step: bool = False
    needs_growth: bool = False
    has_penalty: bool = False

    def propose(
        self, scores: Sequence[Tensor], growth_scores: Sequence[Tensor] | None, state: RuleState, ctx: RuleContext
    ) -> tuple[list[Tensor], RuleState]:
        """Return a grid per layer and the new state.

        A grid is a mask, (m1, n1) bool, True = live, or has a number for each block. 0 kills the block; another number scales
        it, or brings a dead block back, at zero. Do not change `scores` or `state`. The state is a dict of plain values and
        tensors, empty at first, and is saved with the sparsifier.
        """
        ...

    def penalty(self, targets: Sequence[BlockTarget], ctx: RuleContext) -> Tensor | None:
        """A differentiable term for the loss, or None."""
        return None


def check_rule(rule: Any) -> None:
    """Raise KronblocksError for what is no rule; it says what is missing."""
    if isinstance(rule, type):
        raise KronblocksError(f"rule={rule.__name__} is a class: write rule={rule.__name__}(...)")
    wanted = ("propose", "penalty", "score", "every_step", "needs_growth", "has_penalty")
    if missing := [name for name in wanted if not hasattr(rule, name)]:
        raise KronblocksError(f"rule={type(rule).__name__} has no {', '.join(missing)}: make it a subclass of kronblocks.Rule")
    one_of(f"{type(rule).__name__}.score", rule.score, Score)


def checked(answer: Any, rule: Rule, ctx: RuleContext) -> tuple[Sequence[Tensor], RuleState]:
    """Check what `propose` returned, and give its grids and state.

    Raises:
        KronblocksError: it returned something else; the message says what to return.
    """
    name, wanted = f"{type(rule).__name__}.propose", [tuple(mask.shape) for mask in ctx.masks]
    if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], Mapping):
        raise KronblocksError(f"{name} returned {type(answer).__name__}: return (grids, state), a list of tensors and a dict")
    grids, state = answer
    if not isinstance(grids, Sequence) or not all(isinstance(each, Tensor) for each in grids):
        raise KronblocksError(f"{name} returned no list of tensors: return (grids, state), a tensor for each layer")
    if (given := [tuple(each.shape) for each in grids]) != wanted:
        raise KronblocksError(f"{name} returned grids of {given}: return a bool or number for each block, in grids of {wanted}")
    for each in grids:
        if each.dtype != torch.bool and (each.is_complex() or not bool((torch.isfinite(each) & (each >= 0)).all())):
            raise KronblocksError(f"{name} returned numbers that are not finite, or below 0: blocks are multiplied by them")
    return grids, dict(state)


def ranked(scores: Sequence[Tensor], ctx: RuleContext) -> list[Tensor]:
    """Scores that compare blocks of all layers, and are -1 for dead ones. Norms are rescaled by `layer_adaptive`.

    Args:
        scores: an (m1, n1) grid per layer, from 0 on.
        ctx: the rule's context.
    """
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    return layer_adaptive(live) if ctx.score in ("norm", "relative") and ctx.scope == "global" else live


def cut(scores: Sequence[Tensor], ctx: RuleContext, sparsity: float) -> list[Tensor]:
    """Masks, (m1, n1) bool, in which the blocks of least score die until exactly `sparsity` is reached. Dead blocks stay dead.

    Scores of the kinds "norm" and "relative" are rescaled by `layer_adaptive` first, so that a layer's scale does not count.

    Args:
        scores: an (m1, n1) grid per layer, from 0 on.
        ctx: the rule's context.
        sparsity: share to be dead, such as `ctx.sparsity`.

    Raises:
        KronblocksError: a live block's score is below 0 or NaN.
    """
    if not all(((score >= 0) | ~mask).all() for score, mask in zip(scores, ctx.masks, strict=True)):
        raise KronblocksError("cut needs scores from 0 on for live blocks, and no NaN among them: shift them, or use exp()")
    dead = choose_dead(ranked(scores, ctx), ctx.areas, sparsity, ctx.scope, heads=ctx.heads, floor=ctx.floor)
    return [mask & ~each for mask, each in zip(ctx.masks, dead, strict=True)]


def _stays_within(multipliers: Sequence[Tensor], ctx: RuleContext, sparsity_cap: float) -> bool:
    """Whether at most `sparsity_cap` die. With unequal block sizes it may say no because of one block of rounding."""
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
    """Multipliers of the proximal step, max(0, 1 - threshold/score) (equation 14), with at most `sparsity_cap` dead.

    Blocks that would die beyond the cap, or that `keep_longest` protects, do not shrink.
    """
    multipliers = []
    for score, threshold, mask in zip(scores, thresholds, ctx.masks, strict=True):
        multiplier = (1 - threshold / score.clamp_min(torch.finfo(score.dtype).tiny)).clamp_min(0)
        dies = ~mask | (score <= threshold) if threshold > 0 else ~mask  # if they are equal the quotient may round below 1
        multipliers.append(multiplier.masked_fill(dies, 0))
    live = [score.masked_fill(~mask, -1.0) for score, mask in zip(scores, ctx.masks, strict=True)]
    for place, late in enumerate(keep_longest(live, sparsity_cap, heads=ctx.heads, floor=ctx.floor)):
        multipliers[place] = multipliers[place].masked_fill((late > 0) & (multipliers[place] == 0), 1.0)
    if _stays_within(multipliers, ctx, sparsity_cap):
        return multipliers
    allowed = cut(scores, ctx, sparsity_cap)
    return [torch.where((m == 0) & keep, 1.0, m) for m, keep in zip(multipliers, allowed, strict=True)]
