"""Surgeon: the functions by which a sparsifier has layers replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

LIFT_WAITS = (
    "the lift is due, but the parameters are sharded and cannot be replaced, so training goes on with factors. Call "
    "kronblocks.integrations.fsdp.lifted_anew. Or save a checkpoint, build model and sparsifier again, load, call "
    "sparsifier.lift_(), and shard the model again"
)


class Surgeon(Protocol):
    """Replaces layers of the model. The room `surgery` implements it, and this room may not import that."""

    report: Any

    def lift(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        """Replace Kronecker layers by layers of free block values, in the optimisers too. Whether there were any."""
        ...

    def compact(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        """Free the slots of dead blocks, in the optimisers' state too. Whether there were any."""
        ...

    def record(self) -> dict[str, Any]:
        """The structure of the model's block layers, as plain values."""
        ...

    def restore(self, record: dict[str, Any], optimizers: Sequence[Optimizer]) -> bool:
        """Give the model that structure, and the optimisers its parameters. Whether a layer was replaced."""
        ...
