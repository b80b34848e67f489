"""BlockTarget: a layer as an algorithm sees it. It gives one score per block, and gets a mask or multipliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kronblocks.algorithms.balance import balanced
from kronblocks.algorithms.growth import GrowthProbe
from kronblocks.algorithms.masked import MaskedLinear
from kronblocks.algorithms.moments import end_, moments, restart_
from kronblocks.algorithms.protocol import HasBlocks
from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import Diverged, KronblocksError
from kronblocks.core.processes import broadcast_
from kronblocks.core.shards import rows_here, whole

Score = Literal["norm", "relative", "gate", "taylor"]


class Change(NamedTuple):
    """The blocks that a decision has killed and revived, as (m1, n1) bool grids."""

    died: Tensor
    grown: Tensor


class BlockTarget:
    """A named layer: its scores, decisions about its blocks, and what optimisers remember of them.

    Args:
        name: of the layer in the model.
        layer: a block layer, or the `MaskedLinear` of a plain nn.Linear.
    """

    def __init__(self, name: str, layer: HasBlocks) -> None:
        module = layer.linear if isinstance(layer, MaskedLinear) else layer
        assert isinstance(module, nn.Module)
        self.name, self.layer, self.module = name, layer, module
        self._probe: GrowthProbe | None = None

    def __getstate__(self) -> dict[str, Any]:  # a copy measures nothing: its module's hooks belong to the original
        return {**self.__dict__, "_probe": None}

    @property
    def grid(self) -> BlockGrid:
        """How the weight is cut into blocks."""
        return self.layer.grid

    @property
    def area(self) -> int:
        """Weights per block."""
        return self.grid.block.area

    @property
    def mask(self) -> Tensor:
        """(m1, n1) bool, True = live."""
        return self.layer.block_mask

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain nn.Linear."""
        return isinstance(self.layer, MaskedLinear)

    @property
    def is_factored(self) -> bool:
        """Whether the layer stores factors."""
        return getattr(self.module, "rank", None) is not None

    @property
    def gate(self) -> Tensor | None:
        """The trained gate S, (m1, n1); None if the layer has none."""
        return getattr(self.module, "gate", None)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks."""
        return self.layer.block_parameters()

    def differentiable_norms(self) -> Tensor:
        """Frobenius norm of every block, (m1, n1), from the dense weight, for a penalty in the loss."""
        weight = self.module.get_parameter("weight") if self.is_plain else self.module.weight
        assert isinstance(weight, Tensor)
        return self.grid.norms(weight)

    @torch.no_grad()
    def scores(self, kind: Score = "norm") -> Tensor:
        """Scores of the blocks, (m1, n1), from 0 on.

        Args:
            kind: "norm": block norm / sqrt(area). "relative": that, `balanced` over block rows and columns. "gate": magnitude of
                the gate. "taylor": |sum of gradient times weight| / area, an estimate of how much removing the block would
                change the last batch's loss.

        Raises:
            Diverged: scores are not finite.
            KronblocksError: the layer has no gate, or no gradients.
        """
        if kind == "gate":
            if self.gate is None:
                raise KronblocksError(
                    f'layer {self.name!r} has no gate: use score="norm", or method="kron-l1", which makes gates'
                )
            scores = whole(self.gate.detach()).abs().float()
        elif kind == "taylor":
            self._check_gradients()
            scores = self.layer.block_inner_products().abs() / self.area
        else:
            scores = self.layer.block_norms() / self.area**0.5
            if kind == "relative":
                scores = balanced(scores, self.mask)
        if not torch.isfinite(scores).all():
            raise Diverged(
                f"layer {self.name!r} has blocks that are not finite (NaN or infinity): the training has diverged; "
                "lower the learning rate or clip gradients"
            )
        return scores

    def _check_gradients(self) -> None:
        if any(p.grad is None for p in self.parameters()):
            raise KronblocksError(
                f'layer {self.name!r} has no gradients after the optimiser\'s step, but score="taylor" needs them: call '
                "zero_grad() before backward, not right after the step. If the layer is frozen or unused, name it in exclude, or "
                'use score="norm"'
            )

    def apply_(self, proposed: Tensor) -> Change:
        """Apply a rule's decision.

        Args:
            proposed: (m1, n1). bool: exactly these blocks live. Numbers: every block is multiplied by its number; 0 kills it,
                and another number brings a dead block back. Blocks that come back start at zero.
        """
        proposed = proposed.to(self.mask.device)
        live = proposed != 0
        change = Change(self.mask & ~live, ~self.mask & live)
        if proposed.dtype != torch.bool:
            self.layer.scale_blocks_(proposed)
        if not torch.equal(self.mask, live):
            self.layer.set_block_mask_(live)
        return change

    @torch.no_grad()
    def restart_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        """Restart the optimisers' moments of blocks, (m1, n1) bool, that come back to life.

        First moments become zero. Second moments become the mean over the other live blocks. From zero, Adam's first steps
        would be several times the learning rate, since its bias correction is over late in a training.
        """
        others = self.layer.block_entries(self.mask & ~blocks)
        for (parameter, where), (_, elsewhere) in zip(self.layer.block_entries(blocks), others, strict=True):
            for name, moment in moments(optimizers, parameter):
                local = rows_here(moment).local
                restart_(name, moment, local, _beside(moment, where), _beside(moment, elsewhere))

    @torch.no_grad()
    def end_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        """Zero the moments that would revive dead blocks, (m1, n1) bool. Only a plain nn.Linear needs this."""
        if not self.is_plain:  # block layers skip dead blocks, whatever is stored
            return
        for parameter, where in self.layer.block_entries(blocks):
            for name, moment in moments(optimizers, parameter):
                end_(name, moment, rows_here(moment).local, _beside(moment, where))

    def share_mask_(self) -> None:
        """Use rank 0's mask if several processes train."""
        if not self.is_plain:
            for buffer in self.module.buffers():  # also the positions of blocks
                broadcast_(buffer)
        self.layer.set_block_mask_(broadcast_(self.mask.clone()))

    def hook_gradients(self) -> list[RemovableHandle]:
        """Hook a plain layer to make gradients of dead blocks exactly 0 in backward. Block layers do so themselves."""
        return [self.layer.hook_gradients()] if isinstance(self.layer, MaskedLinear) else []

    def start_probe(self) -> None:
        """Begin to measure growth scores, until `read_probe`."""
        self._probe = self._probe or GrowthProbe(self.module, self.grid)

    def drop_probe(self) -> None:
        """Stop measuring without a result."""
        if self._probe is not None:
            self._probe.read()
        self._probe = None

    def read_probe(self) -> Tensor:
        """Growth score of every block, (m1, n1); zeros if the layer is frozen or was not used.

        Raises:
            KronblocksError: the layer got a gradient that the probe did not see.
        """
        assert self._probe is not None, "start_probe comes first"
        probe, self._probe = self._probe, None
        found = probe.read()
        if found is not None:
            return found
        if any(p.requires_grad and p.grad is not None and bool(whole(p.grad).any()) for p in self.parameters()):
            raise KronblocksError(
                f"layer {self.name!r} got a gradient, but its forward hooks, which measure dead blocks, were not called: "
                "call the layer as a module, or use a method without regrowth"
            )
        return torch.zeros(self.grid.shape, device=self.mask.device)


def _beside(moment: Tensor, where: Tensor) -> Tensor:
    """A mask over the rows of a moment that this process holds, broadcastable to them."""
    local, rows = rows_here(moment)
    where = where[rows].to(local.device)
    return where.view(*where.shape, *[1] * (local.dim() - where.dim()))
