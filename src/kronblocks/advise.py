"""Where sparsity pays: `advise` times a model's layers on this machine, dense, factored, and packed at several sparsities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from kronblocks.blocks import BlockGrid, BlockSize
from kronblocks.config import BlockSizeLike, Mismatch, SparsityConfig, TileGroups
from kronblocks.errors import KronblocksError
from kronblocks.ops.cost import Problem, cost, possible_plans
from kronblocks.ops.timing import REFERENCE
from kronblocks.ops.timing_cache import timings
from kronblocks.selection import Selected, select
from kronblocks.specs import Layers, linears

WORTH = 1.03
"""How many times quicker than dense something must be to be advised: less is within what timings vary."""

MOST_WEIGHTS = 2**31
"""Of a layer that is timed."""

_VERBS = {"dense": "keep dense", "factored": "factor", "packed": "pack"}

Progress = Callable[[str, int, int], None]  # what is timed now, how many are done, of how many


class Speed(NamedTuple):
    """One way of computing a layer: the best plan for it, seconds for all rows, and how many times quicker than dense it is."""

    plan: str
    seconds: float
    relative: float


@dataclass(frozen=True)
class Way:
    """A layer dense, factored or packed, in training (forward and backward) and inference."""

    kind: str  # "dense", "factored" or "packed"
    sparsity: float
    training: Speed
    inference: Speed
    weight_bytes: int  # values, and the index where there is one


@dataclass(frozen=True)
class LayerAdvice:
    """All layers of one shape."""

    out_features: int
    in_features: int
    names: tuple[str, ...]
    count: int
    block_size: str
    left_dense: str  # why no block size was tried; empty otherwise
    dense: Way
    factored: Way | None
    packed: tuple[Way, ...]  # one a sparsity
    break_even_training: float | None  # least share of zero blocks at which packed beats dense; None: never
    break_even_inference: float | None

    def best(self, sparsity: float, *, training: bool) -> Way:
        """The way to take at this sparsity; dense unless another is clearly quicker."""
        ways = [way for way in (self.factored, *self.packed) if way is not None and way.sparsity in (0.0, sparsity)]
        best = max(ways, key=lambda way: _speed(way, training).relative, default=self.dense)
        return best if _speed(best, training).relative >= WORTH else self.dense

    def what_to_do(self, *, training: bool) -> str:
        """In words, for all sparsities.

        Returns:
            Such as "keep dense at 50 %; pack at 90 % and 95 %".
        """
        if self.left_dense:
            return f"keep dense: {self.left_dense}"
        verbs: dict[str, list[str]] = {}
        for way in self.packed:
            verb = {"dense": "keep dense", "factored": "factor", "packed": "pack"}[
                self.best(way.sparsity, training=training).kind
            ]
            verbs.setdefault(verb, []).append(percent(way.sparsity))
        if len(verbs) == 1:
            return next(iter(verbs))
        return "; ".join(f"{verb} at {' and '.join(shares)}" for verb, shares in verbs.items())


@dataclass(frozen=True)
class Gain:
    """The whole model's linear layers at one sparsity, each in its best way: times quicker than dense, and bytes of weights."""

    sparsity: float
    training: float
    inference: float
    dense_bytes: int
    weight_bytes: int  # as exported: each layer in the way that is best for inference


@dataclass(frozen=True)
class Advice:
    """What `advise` found; `print` it for a table, `to_dict` it for JSON."""

    rows: int
    rank: int
    device: str
    dtype: str
    threads: int
    layers: tuple[LayerAdvice, ...]
    gains: tuple[Gain, ...]  # one a sparsity

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the format's version."""
        return {"version": 1, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = []
        for layer in self.layers:
            lines += [title(layer), f"  {'':15s}{'training':>34s}{'inference':>34s}{'weights':>14s}"]
            for way in (layer.dense, *filter(None, [layer.factored]), *layer.packed):
                times = "".join(
                    f"{s.plan:>12s}{milliseconds(s.seconds):>13s}{s.relative:8.2f}x" for s in (way.training, way.inference)
                )
                lines.append(f"  {label(way):15s}{times}{way.weight_bytes / 2**20:10.2f} MiB")
            lines += [f"  {line}" for line in remarks(layer)] + [""]
        lines += [f"whole model at {percent(gain.sparsity)} zeros: {summary(gain)}" for gain in self.gains]
        return "\n".join(lines)


def advise(
    layers: nn.Module | str | Sequence[str],
    *,
    rows: int,
    sparsity: Sequence[float] = (0.8, 0.9, 0.95),
    block_size: BlockSizeLike = 16,
    rank: int = 4,
    tile_groups: TileGroups = "per-row",
    on_mismatch: Mismatch = "dense",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Advice:
    """Measure, on this machine, what to keep dense, what to factor and what to pack. Takes seconds for each new shape.

    Args:
        layers: a model, or any of: shapes "4096x1024" (out x in), "4096x1024*12" (twelve of them), "package.module:function"
            (called, returns a model), and "file.safetensors" (its 2-D "*.weight" tensors).
        rows: rows of x per step (batch, times tokens).
        sparsity: shares of zero blocks to try.
        block_size: 16, "16x4" or (16, 4), rows first.
        rank: number of Kronecker terms.
        tile_groups: "per-row", or the number of tile banks.
        on_mismatch: a block size that does not divide a layer: leave it "dense", or take the "nearest" that does.
        device: what to time on.
        dtype: of weights and inputs.
        progress: told what is timed, before each time.

    Raises:
        KronblocksError: a layer, size or device that cannot be read, had or timed; says what to write instead.
    """
    shares = _check(rows, sparsity, device, dtype)
    config = SparsityConfig(
        block_size=block_size, rank=rank, tile_groups=tile_groups, on_mismatch=on_mismatch, rows=rows, target_sparsity=shares[-1]
    )
    distinct = _distinct(linears(layers), config)
    problem = Problem(BlockGrid(1, 1, BlockSize(1, 1)), None, rows=rows, dtype=dtype, device=str(device))
    found = []
    for done, (key, (names, count)) in enumerate(distinct.items()):
        if progress is not None:
            progress(f"{key.out_features}x{key.in_features}", done, len(distinct))
        found.append(_measure(key, names, count, problem, shares))
    gains = tuple(_gain(found, share) for share in shares)
    return Advice(rows, rank, str(device), str(dtype).removeprefix("torch."), torch.get_num_threads(), tuple(found), gains)


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
    """What makes two layers the same question."""

    out_features: int
    in_features: int
    selected: tuple[BlockGrid, int, int] | None  # grid, rank, tile groups
    left_dense: str


def _distinct(found: Layers, config: SparsityConfig) -> dict[_Key, tuple[list[str], int]]:
    """Distinct questions -> names of the layers, and how many there are."""
    distinct: dict[_Key, tuple[list[str], int]] = {}
    for model, counts in found:
        report = select(model, config)
        for each in (*report.selected, *report.left_dense):
            module = model.get_submodule(each.name)
            assert isinstance(module, nn.Linear)
            size = module.out_features * module.in_features
            if not 0 < size <= MOST_WEIGHTS:  # 0: a lazy layer
                raise KronblocksError(f"{each.name} has {size:,} weights: what can be timed has from 1 to {MOST_WEIGHTS:,}")
            chosen = (each.grid, each.rank, each.tile_groups) if isinstance(each, Selected) else None
            reason = "" if isinstance(each, Selected) else each.reason
            names, so_far = distinct.get(key := _Key(module.out_features, module.in_features, chosen, reason), ([], 0))
            distinct[key] = ([*names, each.name], so_far + counts.get(each.name, 1))
    return distinct


def _measure(key: _Key, names: list[str], count: int, problem: Problem, shares: list[float]) -> LayerAdvice:
    size = (key.out_features, key.in_features)
    dense_bytes = math.prod(size) * problem.dtype.itemsize
    if key.selected is None:
        free = dataclasses.replace(problem, grid=BlockGrid(*size, BlockSize(*size)))  # one block: for the reference beside it
        dense = Way("dense", 0.0, *_speeds(free, reference=True), dense_bytes)
        return LayerAdvice(*size, tuple(names), count, "", key.left_dense, dense, None, (), None, None)
    grid, rank, groups = key.selected
    free = dataclasses.replace(problem, grid=grid)
    factors = dataclasses.replace(free, rank=rank, tile_groups=groups)
    dense = Way("dense", 0.0, *_speeds(free, reference=True), dense_bytes)
    factored = Way("factored", 0.0, *_speeds(factors), cost(factors, "dense").parameter_bytes)
    packed = []
    for share in shares:
        sparse = dataclasses.replace(free, density=1 - share)
        packed.append(Way("packed", share, *_speeds(sparse), _packed_bytes(sparse)))
    even_training, even_inference = (_break_even(dataclasses.replace(free, training=training)) for training in (True, False))
    return LayerAdvice(
        *size, tuple(names), count, str(grid.block), "", dense, factored, tuple(packed), even_training, even_inference
    )


def _packed_bytes(problem: Problem) -> int:
    """Values of the live blocks, and the index: four numbers of 4 bytes a block, and where rows and columns begin."""
    live = max(1, round(problem.density * problem.grid.blocks))
    return live * problem.grid.block.area * problem.dtype.itemsize + 4 * (4 * live + sum(problem.grid.shape) + 2)


def _speeds(problem: Problem, *, reference: bool = False) -> tuple[Speed, Speed]:
    """Of training and of inference."""

    def speed(training: bool) -> Speed:
        found = timings(dataclasses.replace(problem, training=training))
        plans = [plan for plan in possible_plans(problem.rank) if plan in found]
        if REFERENCE not in found or not plans:
            raise KronblocksError(f"the memory of {problem.device} is too small to time {problem.grid} with {problem.rows} rows")
        best = REFERENCE if reference else min(plans, key=found.__getitem__)
        return Speed(best, found[best], found[REFERENCE] / found[best])

    return speed(True), speed(False)


def _break_even(problem: Problem) -> float | None:
    """The least share of zero blocks at which the packed plan beats `F.linear`; None: not even with one block in 256."""

    def times(halvings: int) -> tuple[float | None, float]:
        found = timings(dataclasses.replace(problem, density=2.0**-halvings))
        return found.get("packed"), found[REFERENCE]

    def pays(halvings: int) -> bool:
        packed, dense = times(halvings)
        return packed is not None and packed < dense

    least, most = -1, min(8, math.floor(math.log2(problem.grid.blocks)))  # halvings of the density: too few, enough
    if not pays(most):
        return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if pays(middle) else (middle, most)
    if most == 0:
        return 0.0
    density, (sparser, dense), (denser, _) = 2.0**-most, times(most), times(least)
    assert sparser is not None
    slope = (denser - sparser) / density if denser is not None else sparser / density  # not timed: in proportion, at most
    even = density + (dense - sparser) / max(slope, 1e-30)
    return round(1 - min(even, 2 * density), 3)


def _speed(way: Way, training: bool) -> Speed:
    return way.training if training else way.inference


def _gain(layers: Sequence[LayerAdvice], share: float) -> Gain:
    def relative(training: bool) -> float:
        dense = [layer.count * _speed(layer.dense, training).seconds for layer in layers]
        best = [_speed(layer.best(share, training=training), training).relative for layer in layers]
        return sum(dense) / sum(seconds / speed for seconds, speed in zip(dense, best, strict=True))

    exported = sum(layer.count * layer.best(share, training=False).weight_bytes for layer in layers)
    return Gain(share, relative(True), relative(False), sum(layer.count * layer.dense.weight_bytes for layer in layers), exported)


def percent(share: float) -> str:
    """A share in words."""
    return f"{100 * share:.4g} %"


def milliseconds(seconds: float) -> str:
    """A time in words."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


def label(way: Way) -> str:
    """What a way is called in a table."""
    return f"packed, {percent(way.sparsity)}" if way.kind == "packed" else way.kind


def title(layer: LayerAdvice) -> str:
    """Which layers they are."""
    shape = f"{layer.out_features}x{layer.in_features}"
    names = ", ".join(name for name in layer.names[:3] if name != shape) + (", ..." if len(layer.names) > 3 else "")
    blocks = f" in {layer.block_size} blocks" if layer.block_size else ""
    return f"{shape}{f' * {layer.count}' if layer.count > 1 else ''}{blocks}{f' ({names})' if names else ''}"


def remarks(layer: LayerAdvice) -> list[str]:
    """What to do, and from where on sparsity pays."""
    todo = [layer.what_to_do(training=training) for training in (True, False)]
    lines = [f"what to do: {todo[0]}"] if todo[0] == todo[1] else [f"in training: {todo[0]}", f"in inference: {todo[1]}"]
    if not layer.left_dense:
        even = [
            "never" if share is None else f"from {percent(share)} zeros on"
            for share in (layer.break_even_training, layer.break_even_inference)
        ]
        lines.append(f"packed beats dense: in training {even[0]}, in inference {even[1]}")
    return lines


def summary(gain: Gain) -> str:
    """One sparsity's gain in a line."""
    return (
        f"training {gain.training:.2f}x of dense's speed, inference {gain.inference:.2f}x, "
        f"weights {gain.weight_bytes / 2**20:.1f} MiB of {gain.dense_bytes / 2**20:.1f}"
    )
