"""How a layer stores its blocks, as seen by an algorithm: one score per block out, one multiplier per block in.

`LayerTarget` is for layers that know their own blocks (`kronblocks.nn`, or anything that satisfies `HasBlocks`),
`WeightTarget` for a plain `nn.Linear`, whose mask it holds itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from kronblocks.algorithms.growth import GrowthProbe
from kronblocks.algorithms.moments import end_, moments, restart_
from kronblocks.core.blocks import BlockGrid
from kronblocks.core.errors import Diverged, KronblocksError
from kronblocks.core.parameters import move_to_front_
from kronblocks.core.processes import broadcast_
from kronblocks.core.shards import is_sharded, rows_here, summed, whole
from kronblocks.ops.problem import Problem

Score = Literal["norm", "gate", "taylor"]


@runtime_checkable
class HasBlocks(Protocol):
    """What a layer must offer to be the target of an algorithm."""

    grid: BlockGrid
    block_mask: Tensor
    active_plan: str

    def use_plan_(self, plan: str) -> None: ...
    def block_norms(self) -> Tensor: ...
    def nonzero_blocks(self) -> Tensor: ...
    def scale_blocks_(self, multipliers: Tensor) -> None: ...
    def enforce_zeros_(self) -> None: ...
    def set_block_mask_(self, mask: Tensor) -> None: ...
    def block_parameters(self) -> list[nn.Parameter]: ...
    def block_entries(self, blocks: Tensor) -> list[tuple[nn.Parameter, Tensor]]: ...
    def block_inner_products(self) -> Tensor: ...


@runtime_checkable
class HasPlans(Protocol):
    """What a layer offers beside that, if plans are to be chosen for it."""

    plan: str  # "auto", or the one that the user wants
    rows: int

    def keep_index_size_(self) -> None: ...
    def problem(self, *, rows: int | None = None, training: bool = True, input_grad: bool = True) -> Problem: ...


class BlockTarget:
    """Base of the targets; see the two kinds below."""

    def __init__(self, name: str, module: nn.Module, grid: BlockGrid) -> None:
        self.name, self.module, self.grid = name, module, grid
        self._probe: GrowthProbe | None = None

    def __getstate__(self) -> dict[str, Any]:  # a copy measures nothing: its module's hooks belong to the original
        return {**self.__dict__, "_probe": None}

    @property
    def area(self) -> int:
        """Weights per block."""
        return self.grid.block.area

    @property
    def mask(self) -> Tensor:
        """(m1, n1) bool, True = live."""
        raise NotImplementedError

    @property
    def is_factored(self) -> bool:
        """Whether blocks are held as mixtures of tiles."""
        return getattr(self.module, "rank", None) is not None

    @property
    def gate(self) -> Tensor | None:
        """The trained gate S, (m1, n1), where the layer has one."""
        return getattr(self.module, "gate", None)

    def norms(self) -> Tensor:
        """Frobenius norm of every block, (m1, n1)."""
        raise NotImplementedError

    def nonzero_blocks(self) -> Tensor:
        """Which blocks of the weight itself, whatever the mask says, hold a value other than exactly 0, (m1, n1) bool."""
        raise NotImplementedError

    def differentiable_norms(self) -> Tensor:
        """The same, from the dense weight, for a penalty in the loss."""
        weight = self.module.get_parameter("weight") if isinstance(self.module, nn.Linear) else self.module.weight
        assert isinstance(weight, Tensor)
        return self.grid.norms(weight)

    def scores(self, kind: Score = "norm") -> Tensor:
        """What blocks are compared by, (m1, n1), from 0 on.

        Args:
            kind: "norm": block norm / sqrt(area). "gate": magnitude of the gate. "taylor": what removing the block would change
                the loss of the last batch by, to first order, per weight: |gradient times weight, summed| / area.

        Raises:
            Diverged: they are not finite.
            KronblocksError: the layer has no gate.
        """
        if kind == "gate":
            if self.gate is None:
                raise KronblocksError(
                    f'layer {self.name!r} has no gate: use score="norm", or method="kron-l1", which makes gates'
                )
            scores = whole(self.gate.detach()).abs().float()
        elif kind == "taylor":
            scores = self.inner_products().abs() / self.area
        else:
            scores = self.norms() / self.area**0.5
        if not torch.isfinite(scores).all():
            raise Diverged(
                f"layer {self.name!r} has blocks that are not finite (NaN or infinity): the training has diverged; "
                "lower the learning rate or clip gradients"
            )
        return scores

    def inner_products(self) -> Tensor:
        """Gradient times weight, summed over each block, (m1, n1), from the gradients that the parameters hold now.

        Raises:
            KronblocksError: they hold none.
        """
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that hold the blocks."""
        raise NotImplementedError

    def apply_(self, multipliers: Tensor) -> bool:
        """Multiply every block by its number; 0 kills it, and another number brings a dead one back, at zero.

        Returns:
            Whether a block died.
        """
        raise NotImplementedError

    def restart_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        """Make optimisers forget what some blocks, (m1, n1) bool, were before they died.

        First moments become zero. What steps are divided by becomes the mean of the other live blocks': with zero there, late in
        a training, when Adam's correction of the bias is over, first steps would be several times the learning rate.
        """
        raise NotImplementedError

    def end_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        """Make optimisers forget what would bring back blocks, (m1, n1) bool, that have died, where the layer lets it."""

    def set_mask_(self, mask: Tensor) -> None:
        """Make exactly these blocks live."""
        raise NotImplementedError

    def share_mask_(self) -> None:
        """Take rank 0's mask, where several processes train."""
        self.set_mask_(broadcast_(self.mask.clone()))

    def enforce_zeros_(self) -> None:
        """Put dead blocks back to exactly 0, after an optimiser step may have moved them."""
        raise NotImplementedError

    def hook_gradients(self) -> list[RemovableHandle]:
        """Make gradients of dead blocks exactly 0 in backward, so that clipping and closures see the truth."""
        return []

    def start_probe(self) -> None:
        """Begin to measure growth scores; the next `read_probe` ends it."""
        self._probe = self._probe or GrowthProbe(self.module, self.grid)

    def drop_probe(self) -> None:
        """End it without a result."""
        if self._probe is not None:
            self._probe.read()
        self._probe = None

    def read_probe(self) -> Tensor:
        """Growth score of every block, (m1, n1); zeros for a layer that is frozen or was not used.

        Raises:
            KronblocksError: it got a gradient that the probe did not see.
        """
        assert self._probe is not None, "start_probe comes first"
        probe, self._probe = self._probe, None
        found = probe.read()
        if found is not None:
            return found
        if any(p.requires_grad and p.grad is not None and bool(whole(p.grad).any()) for p in self.parameters()):
            raise KronblocksError(
                f"layer {self.name!r} got a gradient, but its forward hooks were not called, by which dead blocks are compared: "
                "call the layer as a module, or take a method without regrowth"
            )
        return torch.zeros(self.grid.shape, device=self.mask.device)


class LayerTarget(BlockTarget):
    """A layer that stores its own blocks and mask, and gives dead blocks no gradient."""

    def __init__(self, name: str, module: nn.Module) -> None:
        assert isinstance(module, HasBlocks)
        super().__init__(name, module, module.grid)
        self._layer: HasBlocks = module

    @property
    def mask(self) -> Tensor:
        return self._layer.block_mask

    def norms(self) -> Tensor:
        return self._layer.block_norms()

    def nonzero_blocks(self) -> Tensor:
        return self._layer.nonzero_blocks()

    @property
    def plan(self) -> str:
        """How the layer computes now."""
        return self._layer.active_plan

    @property
    def plan_is_free(self) -> bool:
        """Whether the library may choose the plan."""
        return isinstance(self._layer, HasPlans) and self._layer.plan == "auto"

    def problem(self, rows: int | None, input_grad: bool, dtype: str | None) -> Problem:
        """The layer's product in a training step, at its present density; it remembers the rows."""
        layer = self._layer
        assert isinstance(layer, HasPlans)
        layer.rows = rows or layer.rows
        problem = layer.problem(input_grad=input_grad)
        return replace(problem, dtype=getattr(torch, dtype)) if dtype else problem

    def set_plan_(self, plan: str) -> None:
        """Let the layer compute another way."""
        self._layer.use_plan_(plan)

    def keep_index_size_(self) -> None:
        """Deaths are not to change the sizes that compiled code knows."""
        if isinstance(self._layer, HasPlans):
            self._layer.keep_index_size_()

    def parameters(self) -> list[nn.Parameter]:
        return self._layer.block_parameters()

    @torch.no_grad()
    def inner_products(self) -> Tensor:
        _check_gradients(self.name, self._layer.block_parameters())
        return self._layer.block_inner_products()

    def apply_(self, multipliers: Tensor) -> bool:
        before = self.mask.clone()
        self._layer.scale_blocks_(multipliers)
        grown = ~before & (multipliers != 0)
        if grown.any():
            self._layer.set_block_mask_(self.mask | grown)
        return bool((before & ~self.mask).any())

    @torch.no_grad()
    def restart_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        others = self._layer.block_entries(self.mask & ~blocks)
        for (parameter, where), (_, elsewhere) in zip(self._layer.block_entries(blocks), others, strict=True):
            for name, moment in moments(optimizers, parameter):
                local, rows = rows_here(moment)
                shape = (*where[rows].shape, *[1] * (local.dim() - where.dim()))
                restart_(name, moment, local, where[rows].view(shape), elsewhere[rows].view(shape))

    def set_mask_(self, mask: Tensor) -> None:
        self._layer.set_block_mask_(mask)

    def share_mask_(self) -> None:
        for buffer in self.module.buffers():  # which slot holds which block, too
            broadcast_(buffer)
        self._layer.set_block_mask_(self.mask.clone())

    def enforce_zeros_(self) -> None:
        self._layer.enforce_zeros_()


class WeightTarget(BlockTarget):
    """A plain `nn.Linear`, untouched; its mask, all live unless one is given, lives here."""

    def __init__(self, name: str, module: nn.Linear, grid: BlockGrid, mask: Tensor | None = None) -> None:
        super().__init__(name, module, grid)
        device = "cpu" if module.weight.is_meta else module.weight.device
        mask = torch.ones(grid.shape, dtype=torch.bool, device=device) if mask is None else mask
        self._mask = mask.to(device, copy=True)

    @property
    def _weight(self) -> nn.Parameter:
        return self.module.get_parameter("weight")  # another object once the model is sharded

    @property
    def mask(self) -> Tensor:
        device = self._weight.device
        if self._mask.device != device and device.type != "meta":  # the model has moved
            self._mask = self._mask.to(device)
        return self._mask

    @torch.no_grad()
    def norms(self) -> Tensor:
        if not is_sharded(self._weight):
            return self.grid.norms(self._weight)
        rows = rows_here(self._weight).local
        return self._sums(rows.to(torch.promote_types(rows.dtype, torch.float32)).square()).sqrt()

    @torch.no_grad()
    def nonzero_blocks(self) -> Tensor:
        return self._sums((rows_here(self._weight).local != 0).float()) > 0

    def parameters(self) -> list[nn.Parameter]:
        return [self._weight]

    @torch.no_grad()
    def inner_products(self) -> Tensor:
        _check_gradients(self.name, [self._weight])
        return self._sums((rows_here(self._weight).local * rows_here(self._weight.grad).local).float())

    @torch.no_grad()
    def apply_(self, multipliers: Tensor) -> bool:
        rows, factors = self._beside(self._weight, multipliers)
        rows.mul_(factors.to(rows.dtype))
        died = self.mask & (multipliers == 0)
        self._mask = multipliers != 0
        return bool(died.any())

    @torch.no_grad()
    def restart_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        for name, moment in moments(optimizers, self._weight):
            rows, chosen = self._beside(moment, blocks)
            restart_(name, moment, rows, chosen, self._beside(moment, self.mask & ~blocks)[1])

    @torch.no_grad()
    def end_moments_(self, optimizers: Sequence[Optimizer], blocks: Tensor) -> None:
        for name, moment in moments(optimizers, self._weight):
            end_(name, moment, *self._beside(moment, blocks))

    def set_mask_(self, mask: Tensor) -> None:
        self._mask = mask.to(self.mask.device, torch.bool).clone()
        self.enforce_zeros_()

    @torch.no_grad()
    def enforce_zeros_(self) -> None:
        self._zero_dead_blocks(self._weight)

    def hook_gradients(self) -> list[RemovableHandle]:
        found = weakref.ref(self)  # the parameter holds its hook where gc does not look: a cycle through it would never be freed

        @torch.no_grad()
        def zero(parameter: Tensor) -> None:
            target = found()
            if target is not None and parameter.grad is not None:  # else a hook that ran before has used it up
                target._zero_dead_blocks(parameter.grad)

        weight = self._weight
        is_trained = weight.requires_grad
        weight.requires_grad_(True)  # a frozen one takes no hooks, and may be unfrozen later
        handle = weight.register_post_accumulate_grad_hook(zero)
        weight.requires_grad_(is_trained)
        move_to_front_(weight, handle.id)  # others may step an optimiser
        return [handle]

    def _zero_dead_blocks(self, weight: Tensor) -> None:
        rows, dead = self._beside(weight, ~self.mask)
        rows.masked_fill_(dead, 0)

    def _beside(self, weight: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a weight that this process holds, as (rows, n1, bn), and a grid's values for them, (rows, n1, 1)."""
        local, where = rows_here(weight)
        if isinstance(local, nn.Parameter):
            local = local.detach()
        spread = grid.to(local.device).repeat_interleave(self.grid.block.rows, 0)[where]
        return local.unflatten(1, (self.grid.shape[1], self.grid.block.cols)), spread.unsqueeze(-1)

    def _sums(self, rows: Tensor) -> Tensor:
        """Sums over each block, (m1, n1), of a tensor like the rows that this process holds."""
        where = rows_here(self._weight).where
        block_row = torch.arange(where.start, where.stop, device=rows.device) // self.grid.block.rows
        sums = rows.unflatten(1, (self.grid.shape[1], self.grid.block.cols)).sum(-1)
        return summed(sums.new_zeros(self.grid.shape).index_add(0, block_row, sums), self._weight)


def _check_gradients(name: str, parameters: Sequence[nn.Parameter]) -> None:
    if any(p.grad is None for p in parameters):
        raise KronblocksError(
            f'layer {name!r} has no gradients after the optimiser\'s step, and score="taylor" needs them: leave layers that are '
            'frozen or unused out with exclude, call zero_grad() before backward, not right after the step, or use score="norm"'
        )
