"""What a sparsifier asks of whoever replaces layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch.optim import Optimizer

LIFT_WAITS = (
    "the lift is due, but the parameters are sharded and cannot be replaced: training goes on with factors until you call "
    "kronblocks.integrations.fsdp.lifted_anew, or save a checkpoint, build model and sparsifier again, load, call "
    "sparsifier.lift_(), and shard the model again"
)


class Surgeon(Protocol):
    """Replaces layers of the model, which this package does not know how to do."""

    report: Any

    def lift(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        """Replace Kronecker layers by layers of free block values, in the optimisers too; whether there were any."""
        ...

    def compact(self, names: Sequence[str], optimizers: Sequence[Optimizer]) -> bool:
        """Give up the slots of dead blocks, in the optimisers' state too; whether there were any."""
        ...

    def record(self) -> dict[str, Any]:
        """The structure of the model's block layers, as plain values."""
        ...

    def restore(self, record: dict[str, Any], optimizers: Sequence[Optimizer]) -> bool:
        """Give the model that structure again, and optimisers its parameters; whether a layer was replaced."""
        ...
