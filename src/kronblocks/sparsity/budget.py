"""Which blocks die so that a target sparsity is hit exactly (equation 17 in docs/math.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kronblocks.errors import DoesNotFit

Scope = Literal["global", "layer"]
Distribution = Literal["erk", "uniform"]


def blocks_to_kill(blocks: int, sparsity: float) -> int:
    """ceil(sparsity * blocks), forgiving rounding errors of the product.

    >>> blocks_to_kill(10, 0.9), blocks_to_kill(10, 0.91), blocks_to_kill(30, 0.1)
    (9, 10, 3)
    """
    return math.ceil(sparsity * blocks - 1e-9)


def best_of_rows(score: Tensor) -> Tensor:
    """The block of greatest score in each block row that has a live one, (m1, n1) bool; dead blocks have scores below 0.

    >>> best_of_rows(torch.tensor([[1.0, 3.0], [-1.0, 0.0], [-1.0, -1.0]])).tolist()
    [[False, True], [False, True], [False, False]]
    """
    return _best_of_rows(score) & (score >= 0)


def _best_of_rows(score: Tensor) -> Tensor:
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.argmax(1, keepdim=True), True)


def _with_live_rows(live: Tensor, score: Tensor) -> Tensor:
    """The same number of live blocks, but one in every block row, as far as they go: the worst of fuller rows make room."""
    live = live.clone()
    for row in (~live.any(1) & (score >= 0).any(1)).nonzero().flatten().tolist():
        spare = live & ~_best_of_rows(score.masked_fill(~live, -math.inf))
        if not spare.any():
            break
        live.view(-1)[score.masked_fill(~spare, math.inf).argmin()] = False
        live[row, score[row].argmax()] = True
    return live


def _choose_dead(scores: Sequence[Tensor], areas: Sequence[int], sparsity: float, *, head: bool) -> list[Tensor]:
    sizes = [score.numel() for score in scores]
    flat = torch.cat([score.detach().flatten().to("cpu", torch.float64) for score in scores])
    protected = torch.zeros_like(flat, dtype=torch.bool)
    for layer, start in zip(flat.split(sizes), _starts(sizes), strict=True):
        protected[start + int(layer.argmax())] = True
    order = flat.argsort(stable=True)
    if head:  # these die when nothing else is left to
        late = torch.zeros_like(protected)
        late[-sizes[-1] :] = best_of_rows(scores[-1].detach().to("cpu", torch.float64)).flatten()
        order = order[late[order].to(torch.int8).argsort(stable=True)]
    order = order[protected[order].to(torch.int8).argsort(stable=True)]
    if len(set(areas)) == 1:
        count = blocks_to_kill(len(flat), sparsity)
    else:
        area = torch.cat([flat.new_full((size,), float(a)) for size, a in zip(sizes, areas, strict=True)])
        wanted = sparsity * float(area.sum())
        reached = area[order].cumsum(0) >= wanted * (1 - 1e-12)
        count = int(torch.nonzero(reached)[0]) + 1 if wanted > 0 else 0
    free = len(flat) - int(protected.sum())
    if count > free:
        raise DoesNotFit(
            f"a sparsity of {sparsity} of {len(flat)} blocks in {len(sizes)} layers would leave a layer without a live block: "
            f"at most {free / len(flat):.4f} is possible here (lower target_sparsity, or take smaller blocks)"
        )
    dead = torch.zeros_like(flat, dtype=torch.bool)
    dead[order[:count]] = True
    return [d.view(score.shape).to(score.device) for d, score in zip(dead.split(sizes), scores, strict=True)]


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def choose_dead(scores: Sequence[Tensor], areas: Sequence[int], sparsity: float, scope: Scope = "global") -> list[Tensor]:
    """The blocks of least score that must be dead for a sparsity; ties broken by layer order and block index.

    With equal block sizes exactly ceil(sparsity * N - 1e-9) of the N blocks; with unequal ones the fewest, in order of score,
    whose weights reach that share of all weights. Every layer keeps its best block; and of the last layer, which mostly is a
    model's head, the best block of each block row dies only when nothing else is left: an output without one is a lost class.

    Args:
        scores: one (m1, n1) grid a layer, in the model's order, from 0 on; dead blocks have scores below 0, and count first.
        areas: weights per block, a number a layer.
        sparsity: share to be dead, in [0, 1).
        scope: over all layers together ("global"), or in each ("layer").

    Returns:
        One (m1, n1) bool grid a layer, True = dead.

    Raises:
        DoesNotFit: a layer would be left without a live block.

    >>> [dead.tolist() for dead in choose_dead([torch.tensor([[3.0, 1.0, 2.0, 1.0]])], [4], 0.5)]
    [[[False, True, False, True]]]
    """
    if scope == "global":
        return _choose_dead(scores, areas, sparsity, head=True)
    last = len(scores) - 1
    return [
        _choose_dead([score], [area], sparsity, head=number == last)[0]
        for number, (score, area) in enumerate(zip(scores, areas, strict=True))
    ]


def erdos_renyi(shapes: Sequence[tuple[int, int]], weights: Sequence[int], density: float) -> list[float]:
    """Densities of layers in proportion to (m1 + n1) / (m1 * n1), none above 1, that give the wanted density over all weights.

    Args:
        shapes: grid (m1, n1) of each layer.
        weights: weights of each layer.
        density: over all layers, in (0, 1].

    Source:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018; the scaled form
        of Evci et al., "Rigging the lottery", 2020, with blocks for weights.

    >>> [round(density, 3) for density in erdos_renyi([(10, 10), (2, 2)], [100, 4], 0.25)]
    [0.22, 1.0]
    """
    raw = [(m1 + n1) / (m1 * n1) for m1, n1 in shapes]
    full: set[int] = set()
    while True:
        left = density * sum(weights) - sum(weights[i] for i in full)
        open_layers = [i for i in range(len(raw)) if i not in full]
        scale = left / sum(raw[i] * weights[i] for i in open_layers) if open_layers else 0.0
        over = {i for i in open_layers if scale * raw[i] > 1}
        if not over:
            return [1.0 if i in full else scale * raw[i] for i in range(len(raw))]
        full |= over


def random_masks(
    shapes: Sequence[tuple[int, int]], areas: Sequence[int], sparsity: float, distribution: Distribution
) -> list[Tensor]:
    """Random live blocks that hit a sparsity exactly, with the layers' densities as the distribution says, up to rounding.

    Args:
        shapes: grid (m1, n1) of each layer.
        areas: weights per block, a number a layer.
        sparsity: share to be dead, in [0, 1).
        distribution: "erk", or "uniform": every layer alike.

    Returns:
        One (m1, n1) bool grid a layer, True = live.
    """
    return strongest_masks([random_scores(shape) for shape in shapes], areas, sparsity, distribution)


def random_scores(shape: tuple[int, int]) -> Tensor:
    """A random order of a grid's blocks, as numbers from 0 on."""
    m1, n1 = shape
    return (m1 * n1 - 1 - torch.randperm(m1 * n1, device="cpu")).view(m1, n1)


def strongest_masks(norms: Sequence[Tensor], areas: Sequence[int], sparsity: float, distribution: Distribution) -> list[Tensor]:
    """The blocks of greatest norm, as many in each layer as a distribution wants; see `random_masks`.

    In the last layer, mostly a model's head, no block row is left without one while others have two.

    Args:
        norms: one (m1, n1) grid a layer, below 0 where a block is dead already and stays so.
        areas: weights per block, a number a layer.
        sparsity: share to be dead, in [0, 1).
        distribution: "erk", or "uniform": every layer alike.
    """
    blocks = [grid.numel() for grid in norms]
    weights = [number * area for number, area in zip(blocks, areas, strict=True)]
    density = [1 - sparsity] * len(norms)
    if distribution == "erk":
        shapes = [(grid.shape[0], grid.shape[1]) for grid in norms]
        density = erdos_renyi(shapes, weights, 1 - sparsity)
    scores = []  # above 1 for the blocks of least rank: as many in each layer as its density wants
    for grid, number, wanted in zip(norms, blocks, density, strict=True):
        order = grid.detach().flatten().argsort(descending=True, stable=True).argsort().to("cpu", torch.float64)
        scores.append((wanted * number / (order.view(grid.shape) + 0.5)).masked_fill(grid.to("cpu") < 0, -1.0))
    masks = [~dead for dead in _choose_dead(scores, areas, sparsity, head=False)]
    norm = norms[-1].detach().to(masks[-1].device, torch.float64)
    return [*masks[:-1], _with_live_rows(masks[-1], norm)]
