"""Candidates of a block-size search, and a shortlist of them by cost and by the weights' spectrum."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kronblocks.algorithms.budget import check_reachable
from kronblocks.config.parts import BlockSizeLike
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import DoesNotFit, KronblocksError
from kronblocks.ops.costs.counts import estimated_seconds
from kronblocks.ops.nearest import captured_energy
from kronblocks.ops.plans import possible_plans
from kronblocks.ops.problem import Problem
from kronblocks.search.report import Path
from kronblocks.surgery.replace import fold_, to_unfold, unfolding
from kronblocks.surgery.report import Selected
from kronblocks.surgery.selection import select

SIZES = (2, 4, 8, 16, 32, 64)
"""Sides of the square candidates, unless the user names sizes.

A layer uses the nearest that divides it. Only if none fits any layer are other divisors candidates, such as 12, 24 and 48 of 192.
"""

_CLEARLY = 0.05  # smaller differences of energy are chance


@dataclass(frozen=True)
class Candidate:
    """A block size, as it fits each layer.

    Args:
        block: the size asked for.
        layers: the layers, each with the nearest size that divides it.
        layer_seconds: estimated seconds of a training step of each layer, at the target sparsity.
        energy: how much of the weights' squares the best mixtures of this size keep: 0 as for random weights, 1 all of it. In
            an untrained model it is about 0 for all sizes.
    """

    block: BlockSize
    layers: tuple[Selected, ...]
    layer_seconds: Mapping[str, float]
    energy: float

    @property
    def estimated_seconds(self) -> float:
        """Estimated seconds of a training step of all layers."""
        return sum(self.layer_seconds.values())

    @property
    def sizes(self) -> dict[str, str]:
        """The block size of each layer."""
        return {layer.name: str(layer.grid.block) for layer in self.layers}


def with_block(config: SparsityConfig, block: BlockSize) -> SparsityConfig:
    """The config with another block size, and the nearest one where it does not divide a layer."""
    return dataclasses.replace(config, block_size=block, on_mismatch="nearest")


def excess_energy(weight: Tensor, grid: BlockGrid, rank: int, tile_groups: int = 1) -> float:
    """`captured_energy` on a scale from that of a random weight of the same shape (0) to all energy (1)."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    by_chance = captured_energy(noise, grid, rank, tile_groups)
    return max(0.0, captured_energy(weight.cpu(), grid, rank, tile_groups) - by_chance) / max(1 - by_chance, 1e-9)


def _step_seconds(layer: Selected, config: SparsityConfig, rows: int, device: str) -> float:
    """Estimated step time of one layer: the mean of a factored step with half the zeros and a lifted one with all of them."""
    density = 1 - config.target_sparsity
    factors = Problem(layer.grid, layer.rank, layer.tile_groups, rows, (1 + density) / 2, device=device)
    values = Problem(layer.grid, None, 1, rows, density, device=device)
    return sum(
        0.5 * min(estimated_seconds(problem, plan) for plan in possible_plans(problem.rank)) for problem in (factors, values)
    )


def _fitting(model: nn.Module, config: SparsityConfig) -> tuple[Selected, ...]:
    """The layers that a block size fits.

    Raises:
        DoesNotFit: it fits no layer; there are too few blocks for the sparsity; or factors exceed what `RankChoice` allows.
    """
    layers = select(model, config).selected
    shapes, areas = [layer.grid.shape for layer in layers], [layer.grid.block.area for layer in layers]
    check_reachable(shapes, areas, config.target_sparsity, config.scope)
    return layers


def _by_size(
    model: nn.Module, config: SparsityConfig, sizes: Iterable[BlockSizeLike]
) -> tuple[dict[BlockSize, tuple[Selected, ...]], str]:
    """The layers that each size fits, and why the last of the other sizes fits none."""
    found, why_not = {}, ""
    for block in map(BlockSize.parse, sizes):
        try:
            found[block] = _fitting(model, with_block(config, block))
        except DoesNotFit as error:
            why_not = f"; {block}: {str(error).splitlines()[0].rstrip(':')}"
    return found, why_not


def _divisors(model: nn.Module, config: SparsityConfig) -> list[int]:
    """The sides from 2 to 64 of square blocks that divide a layer."""
    every = select(model, with_block(dataclasses.replace(config, rank=None, overrides={}), BlockSize(1, 1))).selected
    sides = {math.gcd(*layer.grid.shape) for layer in every}
    return [side for side in range(2, SIZES[-1] + 1) if any(common % side == 0 for common in sides)]


def find_candidates(
    model: nn.Module,
    config: SparsityConfig,
    sizes: Iterable[BlockSizeLike] | None = None,
    *,
    rows: int | Callable[[nn.Module], Mapping[str, int]] = 1024,
) -> list[Candidate]:
    """The block sizes that differ for a model, by ascending area.

    Convolutions count as `sparsify_` would unfold them; the model is unchanged afterwards.

    Args:
        model: dense, before `sparsify_`.
        config: layers and rank; its block size is ignored.
        sizes: the sizes to consider. None: squares with sides 2, 4, ... 64. If none of these fits, squares with any side up to
            64 that divides a layer.
        rows: rows of x per step, for the estimates: one number, or a function from the unfolded model to rows by layer name.

    Raises:
        KronblocksError: `sizes` is empty; no size fits the layers, the sparsity and `RankChoice`; or a layer is block-sparse
            already.
    """
    if sizes is not None and not (sizes := tuple(sizes)):
        raise KronblocksError("sizes= names no block size: a search needs at least two, such as sizes=(4, 8), or None")
    fitting, why_not = _by_size(model, config, SIZES if sizes is None else sizes)
    if sizes is None and not fitting:
        fitting, why_not = _by_size(model, config, _divisors(model, config))
    if not fitting:
        raise KronblocksError(
            f"none of the block sizes fits the layers, the sparsity and the rank: name others, such as sizes=(2, 4){why_not}"
        )
    names = dict.fromkeys(layer.name for layers in fitting.values() for layer in layers)
    with unfolding(model, to_unfold(model, names)) as originals:
        counted = dict.fromkeys(names, rows) if isinstance(rows, int) else rows(model)
        found: dict[tuple[str, ...], Candidate] = {}
        for block, layers in fitting.items():
            found.setdefault(tuple(str(layer.grid) for layer in layers), _candidate(model, config, block, layers, counted))
        fold_(model, originals)
    return sorted(found.values(), key=lambda candidate: candidate.block.area)


def _candidate(
    model: nn.Module, config: SparsityConfig, block: BlockSize, layers: tuple[Selected, ...], rows: Mapping[str, int]
) -> Candidate:
    """The candidate of a size, in a model with unfolded convolutions."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    if sparse := [name for name, module in modules.items() if not isinstance(module, nn.Linear)]:
        raise KronblocksError(
            f"{', '.join(sparse)}: block-sparse already, but a search begins with the dense model: densify_ it first"
        )
    device = next(model.parameters()).device.type
    weights = [module.get_parameter("weight") for module in modules.values()]
    squares = [float(weight.detach().double().square().sum()) for weight in weights]
    shares = [excess_energy(w, layer.grid, layer.rank, layer.tile_groups) for w, layer in zip(weights, layers, strict=True)]
    energy = sum(s * e for s, e in zip(squares, shares, strict=True)) / max(sum(squares), 1e-300)
    seconds = {layer.name: _step_seconds(layer, config, rows[layer.name], device) for layer in layers}
    return Candidate(block, layers, seconds, energy)


def shortlist(candidates: Sequence[Candidate], most: int) -> tuple[list[Candidate], dict[str, str]]:
    """At most `most` candidates to train, without those that another one beats in both estimated time and energy.

    Returns:
        The candidates, and the reason for every other one.
    """
    reasons: dict[str, str] = {}
    for one in candidates:
        for other in candidates:
            faster, richer = other.estimated_seconds < one.estimated_seconds, other.energy > one.energy + _CLEARLY
            if faster and richer and str(other.block) not in reasons:
                reasons[str(one.block)] = (
                    f"{other.block} is estimated faster ({1e3 * other.estimated_seconds:.3g} against "
                    f"{1e3 * one.estimated_seconds:.3g} ms) and keeps more of the weights' structure "
                    f"({100 * other.energy:.0f}% against {100 * one.energy:.0f}%)"
                )
                break
    kept = [candidate for candidate in candidates if str(candidate.block) not in reasons]
    while len(kept) > max(1, most):  # of the two neighbours that differ least in time, drop the slower one
        pairs = [(abs(a.estimated_seconds - b.estimated_seconds), a, b) for a, b in itertools.pairwise(kept)]
        _, first, second = min(pairs, key=lambda pair: pair[0])
        gone = first if first.estimated_seconds > second.estimated_seconds else second
        stays = second if gone is first else first
        reasons[str(gone.block)] = f"estimated nearly as fast as {stays.block}, and only {most} are tried"
        kept.remove(gone)
    return kept, reasons


def entrants(
    model: nn.Module,
    config: SparsityConfig,
    sizes: Iterable[BlockSizeLike] | None,
    most: int,
    rows: Callable[[nn.Module], Mapping[str, int]],
) -> tuple[list[Candidate], dict[str, Path]]:
    """The candidates to train, and the paths of all by size, with the reasons of those that are not trained."""
    everything = find_candidates(model, config, sizes, rows=rows)
    kept, reasons = shortlist(everything, most)
    paths = {
        str(c.block): Path(c.block, c.sizes, c.estimated_seconds, c.energy, why=reasons.get(str(c.block), "")) for c in everything
    }
    return kept, paths
