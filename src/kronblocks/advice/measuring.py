"""`advise`: time a model's layers on this machine, dense, factored, and packed at several sparsities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from kronblocks.advice.layers import Layers, linears
from kronblocks.advice.report import Advice, Gain, LayerAdvice, Speed, Way
from kronblocks.config.methods import TileGroups
from kronblocks.config.parts import BlockSizeLike, Mismatch
from kronblocks.config.sparsity import Frozen, SparsityConfig
from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.ops.costs.counts import cost
from kronblocks.ops.costs.timing import REFERENCE, measure_together
from kronblocks.ops.problem import Problem
from kronblocks.surgery.reasons import linear_sizes
from kronblocks.surgery.report import LeftDense, SurgeryReport
from kronblocks.surgery.selection import select

MOST_WEIGHTS = 2**31
"""Most weights that a timed layer may have."""

Progress = Callable[[str, int, int], None]  # what is timed, how many are done, how many there are


def advise(
    layers: nn.Module | str | Sequence[str],
    *,
    rows: int,
    sparsity: Sequence[float] = (0.8, 0.9, 0.95),
    block_size: BlockSizeLike = 16,
    rank: int | None = None,
    tile_groups: TileGroups | None = None,
    on_mismatch: Mismatch = "dense",
    frozen: Frozen = "keep",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Advice:
    """Measure, on this machine, which layers to keep dense, factor or pack. It takes seconds for each new shape.

    Linear layers and transformers' Conv1D are timed. `Advice.not_timed` lists convolutions and other modules with weights.

    Args:
        layers: a model, or any of: "4096x1024" (out x in), "4096x1024*12" (twelve of these), "package.module:function" (which
            returns a model), and "file.safetensors" (its 2-D "*.weight" tensors).
        rows: rows of x per step (batch, times tokens).
        sparsity: shares of zero blocks to try.
        block_size: 16, "16x4" or (16, 4), rows first.
        rank: number of Kronecker terms; None: a quarter of a block's weights, from 2 to 8, as in a training.
        tile_groups: number of tile banks, or "per-row"; None: "per-row", as in a training.
        on_mismatch: what to do if the block size does not divide a layer: leave it "dense", or use the "nearest" that does.
        frozen: what to do with a model's layers with requires_grad=False: "keep" them dense, as a training does, or "sparsify".
        device: to time on.
        dtype: of weights and inputs.
        progress: called before each timing.

    Raises:
        KronblocksError: a layer, size or device cannot be read, found or timed; the message says what to write instead.
    """
    shares = _check(rows, sparsity, device, dtype)
    config = SparsityConfig(
        block_size=block_size,
        rank=rank,
        tile_groups=tile_groups,
        on_mismatch=on_mismatch,
        frozen=frozen,
        init="random",  # weights do not matter here
        rows=rows,
        target_sparsity=shares[-1],
    )
    distinct, not_timed = _distinct(linears(layers), config)
    problem = Problem(BlockGrid(1, 1, BlockSize(1, 1)), None, rows=rows, dtype=dtype, device=str(device))
    found = []
    for done, (key, (names, count)) in enumerate(distinct.items()):
        if progress is not None:
            progress(f"{key.out_features}x{key.in_features}", done, len(distinct))
        found.append(_measure(key, names, count, problem, shares))
    gains = tuple(_gain(found, share) for share in shares)
    kind = str(dtype).removeprefix("torch.")
    return Advice(rows, rank, str(device), kind, torch.get_num_threads(), tuple(found), gains, not_timed)


def _check(rows: int, sparsity: Sequence[float], device: torch.device | str, dtype: torch.dtype) -> list[float]:
    if not isinstance(sparsity, Sequence) or isinstance(sparsity, str) or not sparsity:
        raise KronblocksError(f"sparsity is a list of shares of zero blocks such as (0.8, 0.9), not {sparsity!r}")
    for share in sparsity:
        SparsityConfig(target_sparsity=share, rows=rows)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise KronblocksError(f"dtype is a floating-point torch.dtype such as torch.float32, not {dtype!r}")
    try:
        torch.empty(0, device=device, dtype=dtype).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise KronblocksError(f"nothing can be timed on the device {str(device)!r} ({reason}): write cpu, or cuda") from error
    return sorted({float(share) for share in sparsity})


class _Key(NamedTuple):
    """What is equal for layers that need to be timed only once."""

    out_features: int
    in_features: int
    selected: tuple[BlockGrid, int, int] | None  # grid, rank, tile groups
    left_dense: str


def _distinct(found: Layers, config: SparsityConfig) -> tuple[dict[_Key, tuple[list[str], int]], tuple[str, ...]]:
    """Distinct keys, with names and number of their layers; and the modules that are not linear layers, with their shares."""
    distinct: dict[_Key, tuple[list[str], int]] = {}
    others: list[LeftDense] = []

    def add(name: str, sizes: tuple[int, int], chosen: tuple[BlockGrid, int, int] | None, reason: str, count: int) -> None:
        if not 0 < math.prod(sizes) <= MOST_WEIGHTS:  # 0: a lazy layer
            raise KronblocksError(f"{name} has {math.prod(sizes):,} weights: what can be timed has from 1 to {MOST_WEIGHTS:,}")
        names, so_far = distinct.get(key := _Key(*sizes, chosen, reason), ([], 0))
        distinct[key] = ([*names, name], so_far + count)

    for model, counts in found:
        report, modules = select(model, config), dict(model.named_modules())
        for each in report.selected:
            sizes = (each.grid.out_features, each.grid.in_features)
            add(each.name, sizes, (each.grid, each.rank, each.tile_groups), "", counts.get(each.name, 1))
        for each in report.left_dense:
            sizes = linear_sizes(modules[each.name]) if each.name in modules else None
            if sizes is None:
                others.append(each)
            else:
                add(each.name, sizes, None, each.reason, counts.get(each.name, 1))
    return distinct, tuple(str(SurgeryReport((), tuple(others))).splitlines())


def _measure(key: _Key, names: list[str], count: int, problem: Problem, shares: list[float]) -> LayerAdvice:
    size = (key.out_features, key.in_features)
    dense_bytes = math.prod(size) * problem.dtype.itemsize
    if key.selected is None:
        free = dataclasses.replace(problem, grid=BlockGrid(*size, BlockSize(*size)))  # one block: for the reference beside it
        training, inference = (_Timings(free, None, [], training) for training in (True, False))
        dense = Way("dense", 0.0, training.dense(), inference.dense(), dense_bytes)
        return LayerAdvice(*size, tuple(names), count, "", key.left_dense, dense, None, (), None, None)
    grid, rank, groups = key.selected
    free = dataclasses.replace(problem, grid=grid)
    factors = dataclasses.replace(free, rank=rank, tile_groups=groups)
    densities = {1 - share for share in shares} | {2.0**-halvings for halvings in range(9) if 2**halvings <= grid.blocks}
    training, inference = (_Timings(free, factors, sorted(densities), training) for training in (True, False))
    dense = Way("dense", 0.0, training.dense(), inference.dense(), dense_bytes)
    factored = Way("factored", 0.0, training.factored(), inference.factored(), cost(factors, "dense").parameter_bytes)
    packed = []
    for share in shares:
        weight_bytes = _packed_bytes(dataclasses.replace(free, density=1 - share))
        packed.append(Way("packed", share, training.packed(1 - share), inference.packed(1 - share), weight_bytes))
    evens = (training.break_even(), inference.break_even())
    return LayerAdvice(*size, tuple(names), count, str(grid.block), "", dense, factored, tuple(packed), *evens)


def _packed_bytes(problem: Problem) -> int:
    """Bytes of the live blocks' values and of the index: four 4-byte numbers per block, and the starts of rows and columns."""
    live = max(1, round(problem.density * problem.grid.blocks))
    return live * problem.grid.block.area * problem.dtype.itemsize + 4 * (4 * live + sum(problem.grid.shape) + 2)


class _Timings:
    """Timings of a layer, in training or in inference: all ways of computing it, in turns with dense.

    The least of the turns counts, since other work of the machine can only add time.

    Args:
        free: the layer with free values.
        factors: the layer with factors; None: it stays dense, and only that is timed.
        densities: of packed values, ascending.
        training: whether to time training, not inference.
    """

    def __init__(self, free: Problem, factors: Problem | None, densities: list[float], training: bool) -> None:
        sparse = [dataclasses.replace(free, density=density) for density in densities] or [free]
        problems = [*sparse, *([] if factors is None else [factors])]
        self._reference, found = measure_together([dataclasses.replace(each, training=training) for each in problems])
        self._by_density = dict(zip(densities, found, strict=False))
        self._of_factors = found[-1]
        if not self._reference or (factors is not None and not all(found)):
            raise KronblocksError(f"the memory of {free.device} is too small to time {free.grid} with {free.rows} rows")

    def dense(self) -> Speed:
        """The time of `F.linear`."""
        return Speed(REFERENCE, min(self._reference), 1.0, 0.0)

    def factored(self) -> Speed:
        """The time of the best factored plan."""
        return self._best(self._of_factors)

    def packed(self, density: float) -> Speed:
        """The time of the best plan at a density."""
        return self._best(self._by_density[density])

    def _best(self, plans: dict[str, list[float]]) -> Speed:
        least = {plan: min(seconds) for plan, seconds in plans.items()}
        best = min(least, key=least.__getitem__)
        return Speed(best, least[best], self.dense().seconds / least[best], _spread(self._reference, plans[best]))

    def break_even(self) -> float | None:
        """The least share of zero blocks at which packed is faster than `F.linear`; None: not even with one block in 256."""
        dense = self.dense().seconds
        points = [(d, min(plans["packed"])) for d, plans in self._by_density.items() if "packed" in plans]
        pays = [(density, seconds) for density, seconds in points if seconds < dense]
        if not pays:
            return None
        density, seconds = max(pays)  # the next denser one does not pay
        denser = [point for point in points if point[0] > density]
        if not denser:
            return round(1 - density, 3)
        above, more = min(denser)
        return round(1 - (density + (dense - seconds) / (more - seconds) * (above - density)), 3)


def _spread(dense: list[float], way: list[float]) -> float:
    """The spread (plus or minus) of the ratios in three thirds of the turns, as a share of their mean."""
    parts = [(dense[third::3], way[third::3]) for third in range(3)]
    ratios = [min(one) / min(other) for one, other in parts if one and other]
    return (max(ratios) - min(ratios)) / (max(ratios) + min(ratios))


def _gain(layers: Sequence[LayerAdvice], share: float) -> Gain:
    def relative(training: bool) -> float:
        dense = [layer.count * layer.dense.speed(training).seconds for layer in layers]
        best = [layer.best(share, training=training).speed(training).relative for layer in layers]
        return sum(dense) / sum(seconds / speed for seconds, speed in zip(dense, best, strict=True))

    exported = sum(layer.count * layer.best(share, training=False).weight_bytes for layer in layers)
    return Gain(share, relative(True), relative(False), sum(layer.count * layer.dense.weight_bytes for layer in layers), exported)
