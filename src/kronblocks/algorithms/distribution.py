"""Which blocks live at first, where a training is sparse from its first step: each layer's share, and its best blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kronblocks.algorithms.budget import FLOOR, best_of_rows, choose_dead

Distribution = Literal["erk", "uniform"]


def _with_live_rows(live: Tensor, score: Tensor) -> Tensor:
    """Move live blocks so that as many block rows as possible have one: the worst ones of fuller rows die instead."""
    live = live.clone()
    for row in (~live.any(1) & (score >= 0).any(1)).nonzero().flatten().tolist():
        spare = live & ~best_of_rows(score.masked_fill(~live, -1.0))
        if not spare.any():
            break
        live.view(-1)[score.masked_fill(~spare, math.inf).argmin()] = False
        live[row, score[row].argmax()] = True
    return live


def erdos_renyi(shapes: Sequence[tuple[int, int]], weights: Sequence[int], density: float) -> list[float]:
    """Densities of layers in proportion to (m1 + n1) / (m1 * n1), at most 1, whose mean over all weights is `density`.

    Args:
        shapes: grid (m1, n1) of each layer.
        weights: weights of each layer.
        density: over all layers, in (0, 1].

    Source:
        Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity", 2018. The scaled
        form is that of Evci et al., "Rigging the lottery", 2020, here for blocks instead of weights.

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


def random_scores(shape: tuple[int, int]) -> Tensor:
    """A random order of a grid's blocks, as numbers from 0 on."""
    m1, n1 = shape
    return (m1 * n1 - 1 - torch.randperm(m1 * n1, device="cpu")).view(m1, n1)


def strongest_masks(
    norms: Sequence[Tensor],
    areas: Sequence[int],
    sparsity: float,
    distribution: Distribution,
    heads: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Masks with the blocks of greatest norm. Each layer gets its share, and at least `FLOOR` of the mean density.

    No block row of a head is empty while other rows have two blocks.

    Args:
        norms: an (m1, n1) grid per layer, below 0 where a block is dead already and stays dead.
        areas: weights per block, one number per layer.
        sparsity: share to be dead, in [0, 1).
        distribution: the layers' shares: "erk", or "uniform" for equal densities.
        heads: whether a layer makes the model's output, one bool per layer; None: unknown, so every layer may be a head.
    """
    blocks = [grid.numel() for grid in norms]
    weights = [number * area for number, area in zip(blocks, areas, strict=True)]
    density = [1 - sparsity] * len(norms)
    if distribution == "erk":
        shapes = [(grid.shape[0], grid.shape[1]) for grid in norms]
        density = erdos_renyi(shapes, weights, 1 - sparsity)
    scores = []  # above 1 for the best blocks of each layer, as many as its density allows
    for grid, number, wanted in zip(norms, blocks, density, strict=True):
        order = grid.detach().flatten().argsort(descending=True, stable=True).argsort().to("cpu", torch.float64)
        scores.append((wanted * number / (order.view(grid.shape) + 0.5)).masked_fill(grid.to("cpu") < 0, -1.0))
    masks = [~dead for dead in choose_dead(scores, areas, sparsity, floor=FLOOR)]
    is_head = [True] * len(masks) if heads is None else heads
    return [
        _with_live_rows(mask, norm.detach().to(mask.device, torch.float64)) if may_be else mask
        for mask, norm, may_be in zip(masks, norms, is_head, strict=True)
    ]
