"""Which blocks die so that a target sparsity is hit exactly (equation 17 in docs/math.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kronblocks.core.errors import DoesNotFit

Scope = Literal["global", "layer"]

FLOOR = 0.25
"""Share of the mean density that every layer keeps when blocks of all layers are compared by norm."""

_NEVER = 3  # the number of blocks that never die: see `keep_longest`


def blocks_to_kill(blocks: int, sparsity: float) -> int:
    """ceil(sparsity * blocks - 1e-9): how many blocks must be dead. The 1e-9 is for rounding errors of the product.

    >>> blocks_to_kill(10, 0.9), blocks_to_kill(10, 0.91), blocks_to_kill(30, 0.1)
    (9, 10, 3)
    """
    return math.ceil(sparsity * blocks - 1e-9)


def best_of_rows(score: Tensor) -> Tensor:
    """The best live block of each block row, (m1, n1) bool; rows without a live block have none. Dead blocks score below 0.

    >>> best_of_rows(torch.tensor([[1.0, 3.0], [-1.0, 0.0], [-1.0, -1.0]])).tolist()
    [[False, True], [False, True], [False, False]]
    """
    best = torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argmax(1, keepdim=True), True)
    return best & (score >= 0)


def keep_longest(scores: Sequence[Tensor], sparsity: float, *, heads: Sequence[bool] = (), floor: float = 0.0) -> list[Tensor]:
    """Protection of each block, (m1, n1) uint8 per layer: blocks die only after all those with a lower number.

    0: not protected. 1: the best blocks of a layer, up to `floor` times the mean density. 2: the best block of each block
    row of a head. 3: the best block of a layer, which never dies. Dead blocks have 0.

    Args:
        scores: an (m1, n1) grid per layer, from 0 on; dead blocks have scores below 0.
        sparsity: target share of weights in dead blocks.
        heads: whether a layer makes the model's output, one bool per layer; empty: none does.
        floor: share of the mean density that every layer keeps as long as possible.

    >>> keep_longest([torch.tensor([[4.0, 1.0, 3.0, 2.0], [0.5, 0.4, 0.3, 0.2]])], 0.5, heads=[True], floor=0.5)[0].tolist()
    [[3, 0, 1, 0], [2, 0, 0, 0]]
    """
    numbers = []
    for place, score in enumerate(scores):
        number = torch.zeros_like(score, dtype=torch.uint8)
        kept = math.ceil(floor * (1 - sparsity) * score.numel() - 1e-9)
        if kept > 1:
            number.view(-1)[score.flatten().topk(kept).indices] = 1
        if len(heads) and heads[place]:
            number[best_of_rows(score)] = 2
        number.view(-1)[score.argmax()] = 3
        numbers.append(number.masked_fill(score < 0, 0))
    return numbers


def _weights_to_kill(weights: float, sparsity: float, areas: Sequence[int]) -> float:
    """sparsity * weights, less a margin for rounding errors, as in `blocks_to_kill`."""
    return sparsity * weights - max(1e-12 * sparsity * weights, 1e-9 * min(areas))


def _out_of_reach(sparsity: float, blocks: int, layers: int, free: int) -> DoesNotFit:
    return DoesNotFit(
        f"a sparsity of {sparsity} of {blocks} blocks in {layers} layers would leave a layer without a live block: "
        f"at most {free / blocks:.4f} is possible here (lower target_sparsity, or use smaller blocks)"
    )


def check_reachable(
    shapes: Sequence[tuple[int, ...]],
    areas: Sequence[int],
    sparsity: float,
    scope: Scope = "global",
    *,
    alive: Sequence[bool] | None = None,
) -> None:
    """Refuse a sparsity that would leave a layer without a live block, whatever the scores.

    Args:
        shapes: grid (m1, n1) of each layer.
        areas: weights per block, one number per layer.
        sparsity: share to be dead, in [0, 1).
        scope: over all layers together ("global"), or in each ("layer").
        alive: whether a layer has a live block now, one bool per layer; None: all have.

    Raises:
        DoesNotFit: `choose_dead` could not reach the sparsity.

    >>> check_reachable([(2, 2), (1, 1)], [4, 4], 0.6)
    >>> check_reachable([(2, 2), (1, 1)], [4, 4], 0.61)
    Traceback (most recent call last):
    kronblocks.core.errors.DoesNotFit: a sparsity of 0.61 of 5 blocks in 2 layers would leave a layer without a live block: ...
    """
    keeps = [True] * len(shapes) if alive is None else list(alive)
    sizes = [math.prod(shape) for shape in shapes]
    budgets = [range(len(sizes))] if scope == "global" else [range(i, i + 1) for i in range(len(sizes))]
    for layers in budgets:
        own = [areas[i] for i in layers]
        blocks, free = sum(sizes[i] for i in layers), sum(sizes[i] - keeps[i] for i in layers)
        if len(set(own)) == 1:
            reached = blocks_to_kill(blocks, sparsity) <= free
        else:
            weights = float(sum(sizes[i] * areas[i] for i in layers))
            may_die = weights - sum(areas[i] for i in layers if keeps[i])
            reached = may_die >= _weights_to_kill(weights, sparsity, own)
        if not reached:
            raise _out_of_reach(sparsity, blocks, len(own), free)


def _choose_dead(
    scores: Sequence[Tensor],
    areas: Sequence[int],
    sparsity: float,
    heads: Sequence[bool] = (),
    floor: float = 0.0,
    reach: bool = True,
) -> list[Tensor]:
    sizes = [score.numel() for score in scores]
    on_cpu = [score.detach().to("cpu", torch.float64) for score in scores]
    flat = torch.cat([score.flatten() for score in on_cpu])
    late = torch.cat([each.flatten() for each in keep_longest(on_cpu, sparsity, heads=heads, floor=floor)])
    order = flat.argsort(stable=True)
    order = order[late[order].argsort(stable=True)]
    if len(set(areas)) == 1:
        count = blocks_to_kill(len(flat), sparsity)
    else:
        area = torch.cat([flat.new_full((size,), float(a)) for size, a in zip(sizes, areas, strict=True)])
        wanted = _weights_to_kill(float(area.sum()), sparsity, areas)
        reached = area[order].cumsum(0) >= wanted
        count = int(torch.nonzero(reached)[0]) + 1 if wanted > 0 else 0
    free = len(flat) - int((late == _NEVER).sum())
    if count > free and reach:
        raise _out_of_reach(sparsity, len(flat), len(sizes), free)
    dead = torch.zeros_like(flat, dtype=torch.bool)
    dead[order[: min(count, free)]] = True
    return [d.view(score.shape).to(score.device) for d, score in zip(dead.split(sizes), scores, strict=True)]


def layer_adaptive(scores: Sequence[Tensor]) -> list[Tensor]:
    """Rescale scores so that blocks of different layers compare, whatever each layer's scale (equation 22 in docs/math.md).

    A block's squared score is divided by the sum of squares of the blocks of its layer that outlive it, then multiplied by
    m1 + n1. The order within a layer stays. If scores are distributed alike in every layer, densities are as in `erdos_renyi`.

    Args:
        scores: an (m1, n1) grid per layer, from 0 on, in any unit; dead blocks have scores below 0, and keep them.

    Source:
        Lee, Park, Mo, Ahn, Shin, "Layer-adaptive sparsity for the magnitude-based pruning" (LAMP), 2021. Here for blocks
        instead of weights, and with the factor m1 + n1.

    >>> small, large = torch.tensor([[1.0, 2.0]]), torch.tensor([[100.0, 200.0]])
    >>> [grid.mul(10).round().tolist() for grid in layer_adaptive([small, large])]
    [[[6.0, 30.0]], [[6.0, 30.0]]]
    """
    adapted = []
    for score in scores:
        flat = score.detach().flatten().to("cpu", torch.float64)
        live = flat >= 0
        top = float(flat.max())
        relative = flat / top if top > 0 else torch.ones_like(flat)  # whose squares do not overflow
        squares, order = relative.square().masked_fill(~live, 0).sort(stable=True)
        outlive = squares.flip(0).cumsum(0).flip(0)
        found = torch.empty_like(flat).index_copy_(0, order, squares / outlive * sum(score.shape))
        adapted.append(torch.where(live, found, flat).view(score.shape).to(score.device))
    return adapted


def choose_dead(
    scores: Sequence[Tensor],
    areas: Sequence[int],
    sparsity: float,
    scope: Scope = "global",
    *,
    heads: Sequence[bool] = (),
    floor: float = 0.0,
    reach: bool = True,
) -> list[Tensor]:
    """Choose the blocks of least score that must be dead for a sparsity. Layer order and block index break ties.

    With equal block sizes exactly ceil(sparsity * N - 1e-9) of the N blocks are dead. With unequal ones the fewest blocks
    die, in order of score, whose weights reach that share of all weights. `keep_longest` says which blocks die last.

    Args:
        scores: an (m1, n1) grid per layer, in the model's order, from 0 on; dead blocks have scores below 0, and count first.
        areas: weights per block, one number per layer.
        sparsity: share to be dead, in [0, 1).
        scope: over all layers together ("global"), or in each ("layer"), where `floor` does not apply.
        heads: whether a layer makes the model's output, one bool per layer; empty: none does.
        floor: share of the mean density that every layer keeps as long as possible.
        reach: raise if the sparsity cannot be reached. False: then all but the best block of every layer die.

    Returns:
        An (m1, n1) bool grid per layer, True = dead.

    Raises:
        DoesNotFit: a layer would be left without a live block, and `reach` is set.

    >>> [dead.tolist() for dead in choose_dead([torch.tensor([[3.0, 1.0, 2.0, 1.0]])], [4], 0.5)]
    [[[False, True, False, True]]]
    """
    if scope == "global":
        return _choose_dead(scores, areas, sparsity, heads, floor, reach)
    return [
        _choose_dead([score], [area], sparsity, heads[number : number + 1], reach=reach)[0]
        for number, (score, area) in enumerate(zip(scores, areas, strict=True))
    ]
