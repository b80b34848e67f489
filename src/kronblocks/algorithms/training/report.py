"""SparsityReport: counts of blocks that are exactly zero."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kronblocks.algorithms.heads import Heads, Source
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.core.errors import KronblocksWarning
from kronblocks.core.tables import listed, rows_of, some, span, text_table

STARVED = 1 / 3
"""A layer below this share of the mean density counts as starved, if the mean density would be `STARVED_FROM` blocks or more."""
STARVED_FROM = 10


@dataclass(frozen=True)
class LayerSparsity:
    """One targeted layer."""

    name: str
    kind: str
    out_features: int
    in_features: int
    block_size: str
    live_blocks: int
    total_blocks: int
    plan: str

    @property
    def sparsity(self) -> float:
        """Share of the layer's blocks that are exactly zero."""
        return 1 - self.live_blocks / self.total_blocks

    @property
    def weight(self) -> str:
        """The weight's shape."""
        return f"{self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class SparsityReport:
    """The counts of all targeted layers. Print it for a table.

    With more than 12 layers, like layers share a row, with their mean sparsity and that of the sparsest one.
    `print(report.table(every_layer=True))` has a row for each.
    """

    layers: tuple[LayerSparsity, ...]
    block_sparsity: float  # share of the targeted weights that lie in zero blocks
    notes: tuple[str, ...] = ()  # remarks: replaced layers, a sparsifier that is not attached
    heads: tuple[str, ...] = ()  # the layers that make the model's output, once known
    heads_from: Source | None = None  # how they were found; None: not yet

    @property
    def starved(self) -> tuple[LayerSparsity, ...]:
        """Layers with far fewer live blocks than the mean density would give them."""
        density = 1 - self.block_sparsity
        return tuple(
            layer
            for layer in self.layers
            if layer.live_blocks < STARVED * density * layer.total_blocks and density * layer.total_blocks >= STARVED_FROM
        )

    @property
    def live_blocks(self) -> int:
        """Number of blocks with a value that is not zero."""
        return sum(layer.live_blocks for layer in self.layers)

    @property
    def total_blocks(self) -> int:
        """Number of blocks of the targeted layers."""
        return sum(layer.total_blocks for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "block_sparsity": self.block_sparsity,
            "live_blocks": self.live_blocks,
            "total_blocks": self.total_blocks,
            "notes": list(self.notes),
            "heads": list(self.heads),
            "heads_from": self.heads_from,
            "layers": [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers],
        }

    def __str__(self) -> str:
        return self.table()

    def table(self, *, every_layer: bool = False) -> str:
        """What `print` shows; with `every_layer`, with a row for each layer."""
        groups, hint = rows_of(self.layers, lambda layer: layer.name, _kind, every_layer=every_layer)
        rows = [("layer", "kind", "weight", "block", "live / total", "sparsity", "plan"), *map(_row, groups)]
        total = f"{self.live_blocks} of {self.total_blocks} blocks live, {self.block_sparsity:.4f} of the weights in zero blocks"
        return "\n".join([text_table(rows), total, *self._remarks(), *self.notes, *hint])

    def _remarks(self) -> list[str]:
        remarks = []
        if self.heads_from is not None:
            how = "" if self.heads_from == "named" else f" ({self.heads_from})"
            remarks.append(f"each block row keeps a block in: {listed(self.heads) or 'no layer'}{how}")
        if self.starved:
            remarks.append(f"far below the mean density: {listed([layer.name for layer in self.starved])}")
        return remarks


def _kind(layer: LayerSparsity) -> Hashable:
    return layer.kind, layer.weight, layer.block_size


def _row(layers: Sequence[LayerSparsity]) -> Sequence[str]:
    """A row of the table, for one layer or several like layers: all their blocks, and the sparsest layer."""
    first, live, total = layers[0], sum(layer.live_blocks for layer in layers), sum(layer.total_blocks for layer in layers)
    sparsity, most = f"{1 - live / total:.4f}", f"{max(layer.sparsity for layer in layers):.4f}"
    plans = Counter(layer.plan for layer in layers)
    return (
        span([layer.name for layer in layers]),
        first.kind,
        first.weight,
        first.block_size,
        f"{live} / {total}",
        sparsity if most == sparsity else f"{sparsity}, most {most}",
        first.plan if len(plans) == 1 else ", ".join(f"{plan} ({count})" for plan, count in plans.items()),
    )


@torch.no_grad()
def count_blocks(targets: Sequence[BlockTarget], notes: Sequence[str] = (), heads: Heads | None = None) -> SparsityReport:
    """Count the blocks whose values are all exactly zero, from the weights and not from the masks."""
    layers, zero, weights = [], 0, 0
    for target in targets:
        live, grid = int(target.layer.nonzero_blocks().sum()), target.grid
        layers.append(
            LayerSparsity(
                target.name,
                getattr(target.module, "kind", "Linear"),
                grid.out_features,
                grid.in_features,
                str(grid.block),
                live,
                grid.blocks,
                getattr(target.module, "active_plan", "dense"),
            )
        )
        zero += (grid.blocks - live) * grid.block.area
        weights += grid.weights
    share, found = zero / weights if weights else 0.0, heads or Heads(())
    return SparsityReport(tuple(layers), share, tuple(notes), found.names or (), found.source)


def warn_of_starved_layers(report: SparsityReport) -> None:
    """Warn of layers that pruning has left far below the mean density."""
    if not report.starved:
        return
    starved = [f"{layer.name} ({layer.live_blocks} of {layer.total_blocks} blocks)" for layer in report.starved]
    warnings.warn(
        f"pruning has ended, and {some(starved)} kept less than a third of the mean density, "
        f"{1 - report.block_sparsity:.3f}: their blocks scored lowest. To give every layer the same density, write "
        'scope="layer"; to leave some dense, name them in exclude',
        KronblocksWarning,
        stacklevel=2,
    )


def warn_if_missed(report: SparsityReport, schedule: SparsitySchedule, rule: str) -> None:
    """Say so if pruning has ended and a rule has left more than the target, by more than a block of each layer."""
    weights = [layer.out_features * layer.in_features for layer in report.layers]
    block_each = sum(each / layer.total_blocks for each, layer in zip(weights, report.layers, strict=True))
    if report.block_sparsity < schedule.target_sparsity - max(0.01, block_each / sum(weights)):
        warnings.warn(
            f"pruning has ended, and {100 * report.block_sparsity:.1f}% of the weights are in zero blocks, not the "
            f"{100 * schedule.target_sparsity:g}% that were asked for: {rule}.propose left more blocks live. Let "
            "it return cut(scores, ctx, ctx.sparsity), from kronblocks.algorithms, which hits the target exactly",
            KronblocksWarning,
            stacklevel=2,
        )


def warn_if_too_dense(sparsity: float, schedule: SparsitySchedule, why: str) -> None:
    """Warn if a finished training is a percent or more below its target; `why` is the reason."""
    if sparsity < schedule.target_sparsity - 0.01:
        warnings.warn(
            f"after the training {100 * sparsity:.1f}% of the weights are in zero blocks, not "
            f"{100 * schedule.target_sparsity:g}%: {why}; pruning ends at step {schedule.end_step} of {schedule.total_steps}",
            KronblocksWarning,
            stacklevel=4,
        )


def dead_share(targets: Sequence[BlockTarget]) -> float:
    """Share of the weights that lie in dead blocks by the masks; 0 on the meta device, where masks are unknown."""
    known = [target for target in targets if not target.mask.is_meta]
    dead = sum(int((~target.mask).sum()) * target.area for target in known)
    weights = sum(target.grid.weights for target in known)
    return dead / weights if weights else 0.0
