"""What is sparse now, counted: exact zeros, in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kronblocks.sparsity.targets import BlockTarget


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


@dataclass(frozen=True)
class SparsityReport:
    """All targeted layers. Print it for a table."""

    layers: tuple[LayerSparsity, ...]
    block_sparsity: float  # share of the targeted weights that lie in zero blocks; the share of blocks where all have one size
    notes: tuple[str, ...] = ()  # what the numbers do not say: layers that are gone, a sparsifier that is not attached

    @property
    def live_blocks(self) -> int:
        """Blocks with a value that is not zero."""
        return sum(layer.live_blocks for layer in self.layers)

    @property
    def total_blocks(self) -> int:
        """All blocks of the targeted layers."""
        return sum(layer.total_blocks for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "block_sparsity": self.block_sparsity,
            "live_blocks": self.live_blocks,
            "total_blocks": self.total_blocks,
            "notes": list(self.notes),
            "layers": [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers],
        }

    def __str__(self) -> str:
        rows = [("layer", "kind", "weight", "block", "live / total", "sparsity", "plan")] + [
            (
                layer.name,
                layer.kind,
                f"{layer.out_features}x{layer.in_features}",
                layer.block_size,
                f"{layer.live_blocks} / {layer.total_blocks}",
                f"{layer.sparsity:.4f}",
                layer.plan,
            )
            for layer in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        total = f"{self.live_blocks} of {self.total_blocks} blocks live, {self.block_sparsity:.4f} of the weights in zero blocks"
        return "\n".join([*lines, total, *self.notes])


@torch.no_grad()
def count_blocks(targets: Sequence[BlockTarget], notes: Sequence[str] = ()) -> SparsityReport:
    """Count, from the weights themselves and not from the masks, the blocks whose every value is exactly zero."""
    layers, zero, weights = [], 0, 0
    for target in targets:
        live, grid = int(target.nonzero_blocks().sum()), target.grid
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
    return SparsityReport(tuple(layers), zero / weights if weights else 0.0, tuple(notes))


def dead_share(targets: Sequence[BlockTarget]) -> float:
    """Share of the weights that lie in dead blocks by the masks; none on the meta device, where nothing is known."""
    known = [target for target in targets if not target.mask.is_meta]
    dead = sum(int((~target.mask).sum()) * target.area for target in known)
    weights = sum(target.grid.weights for target in known)
    return dead / weights if weights else 0.0
