"""Candidates of a block-size search: from the layers' divisors, and a shortlist by cost and by the weights' spectrum."""

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
"""Sides of the square blocks that are candidates where the user names none: powers of two.

A layer takes the nearest that divides it. Its other divisors (12, 24 and 48 of 192) are candidates where none of these fits any
layer; else name them.
"""

_CLEARLY = 0.05  # of the energy: less of a difference is chance


@dataclass(frozen=True)
class Candidate:
    """A block size, as it fits each layer.

    Args:
        block: the size asked for.
        layers: what the layers take of it: the nearest size that divides them.
        layer_seconds: a training step of each of these layers at the target sparsity, by the counts.
        energy: what the best mixtures of this block size keep of the weights' squares, from 0, no more than of random weights, to
            1, everything. Of an untrained model about 0 for all sizes.
    """

    block: BlockSize
    layers: tuple[Selected, ...]
    layer_seconds: Mapping[str, float]
    energy: float

    @property
    def estimated_seconds(self) -> float:
        """A training step of all of them."""
        return sum(self.layer_seconds.values())

    @property
    def sizes(self) -> dict[str, str]:
        """The block size of each layer."""
        return {layer.name: str(layer.grid.block) for layer in self.layers}


def with_block(config: SparsityConfig, block: BlockSize) -> SparsityConfig:
    """The config with another block size, taken as near as it fits each layer."""
    return dataclasses.replace(config, block_size=block, on_mismatch="nearest")


def excess_energy(weight: Tensor, grid: BlockGrid, rank: int, tile_groups: int = 1) -> float:
    """How far `captured_energy` is on the way from that of a random weight of the same shape (0) to everything (1)."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), device="cpu")
    by_chance = captured_energy(noise, grid, rank, tile_groups)
    return max(0.0, captured_energy(weight.cpu(), grid, rank, tile_groups) - by_chance) / max(1 - by_chance, 1e-9)


def _step_seconds(layer: Selected, config: SparsityConfig, rows: int, device: str) -> float:
    """Estimated time of one layer: half a training before the lift at half the zeros, half after it at all of them."""
    density = 1 - config.target_sparsity
    factors = Problem(layer.grid, layer.rank, layer.tile_groups, rows, (1 + density) / 2, device=device)
    values = Problem(layer.grid, None, 1, rows, density, device=device)
    return sum(
        0.5 * min(estimated_seconds(problem, plan) for plan in possible_plans(problem.rank)) for problem in (factors, values)
    )


def _fitting(model: nn.Module, config: SparsityConfig) -> tuple[Selected, ...]:
    """The layers that a block size fits.

    Raises:
        DoesNotFit: there are none, too few blocks are left to reach the sparsity, or the factors have more parameters than
            `RankChoice` allows.
    """
    layers = select(model, config).selected
    shapes, areas = [layer.grid.shape for layer in layers], [layer.grid.block.area for layer in layers]
    check_reachable(shapes, areas, config.target_sparsity, config.scope)
    return layers


def _by_size(
    model: nn.Module, config: SparsityConfig, sizes: Iterable[BlockSizeLike]
) -> tuple[dict[BlockSize, tuple[Selected, ...]], str]:
    """The layers that each size fits, and why the last of the others fits none."""
    found, why_not = {}, ""
    for block in map(BlockSize.parse, sizes):
        try:
            found[block] = _fitting(model, with_block(config, block))
        except DoesNotFit as error:
            why_not = f"; {block}: {str(error).splitlines()[0].rstrip(':')}"
    return found, why_not


def _divisors(model: nn.Module, config: SparsityConfig) -> list[int]:
    """Sides from 2 to 64 of squares that divide a layer."""
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
    """The block sizes that make a difference for a model, by ascending area.

    Convolutions count as what `sparsify_` makes of them, and stand where they stood afterwards.

    Args:
        model: dense, before `sparsify_`.
        config: which layers, which rank; its block size does not count.
        sizes: those to consider; None: squares of powers of two from 2 to 64, and only where none of them fits, of all sides up
            to 64 that divide a layer.
        rows: rows of x per step, for the estimated times: of every layer, or counted by a function of the model whose
            convolutions are linear layers, by the layers' names.

    Raises:
        KronblocksError: no size is named, none of them fits any layer, leaves blocks enough for the sparsity, or makes factors as
            few as `RankChoice` allows; a layer that is block-sparse already.
    """
    if sizes is not None and not (sizes := tuple(sizes)):
        raise KronblocksError("sizes= names no block size: a search wants at least two, such as sizes=(4, 8), or None")
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
    """What a size costs and keeps, in a model whose convolutions are linear layers."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    if sparse := [name for name, module in modules.items() if not isinstance(module, nn.Linear)]:
        raise KronblocksError(
            f"{', '.join(sparse)}: block-sparse already, and a search begins with the dense model: densify_ it first"
        )
    device = next(model.parameters()).device.type
    weights = [module.get_parameter("weight") for module in modules.values()]
    squares = [float(weight.detach().double().square().sum()) for weight in weights]
    shares = [excess_energy(w, layer.grid, layer.rank, layer.tile_groups) for w, layer in zip(weights, layers, strict=True)]
    energy = sum(s * e for s, e in zip(squares, shares, strict=True)) / max(sum(squares), 1e-300)
    seconds = {layer.name: _step_seconds(layer, config, rows[layer.name], device) for layer in layers}
    return Candidate(block, layers, seconds, energy)


def shortlist(candidates: Sequence[Candidate], most: int) -> tuple[list[Candidate], dict[str, str]]:
    """Candidates worth training: none that another beats in both estimated time and energy, and at most `most`.

    Returns:
        The candidates, and for every other one why it is not among them.
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
    while len(kept) > max(1, most):  # of two neighbours the slower one goes, where they differ least in time
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
    """The candidates that are trained, and the paths of all, by size, with the reasons of those that are not.

    See `find_candidates` and `shortlist`.
    """
    everything = find_candidates(model, config, sizes, rows=rows)
    kept, reasons = shortlist(everything, most)
    paths = {
        str(c.block): Path(c.block, c.sizes, c.estimated_seconds, c.energy, why=reasons.get(str(c.block), "")) for c in everything
    }
    return kept, paths
