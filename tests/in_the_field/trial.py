"""A small training over the lift, and what is right of it: zeros, losses, values that train, outputs that agree with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests import helpers
from tests.helpers import STEPS, check_layers_agree
from torch import Tensor, nn

from kronblocks import BlockSparseLinear, SparsityConfig, parameter_groups, sparsify_
from kronblocks.nn.base import BlockLayer

SPARSITY = 0.75
_TEACHER = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)) / 32**0.5


def mlp() -> nn.Sequential:
    """32 -> 64 -> 16."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def config(method: str = "two-phase", **settings: Any) -> SparsityConfig:
    """Blocks of 8x8, to 75% zeros; so many rows that layers of live blocks compute with these alone, by their index."""
    return helpers.config(method, **{"rows": 2**16, **settings})


def batch(rows: int = 32) -> tuple[Tensor, Tensor]:
    """Something that the model can learn."""
    x = torch.randn(rows, 32)
    return x, (x @ _TEACHER).tanh()


def loss_of(model: Callable[[Tensor], Tensor], rows: int = 32) -> Tensor:
    """Of a fresh batch."""
    x, y = batch(rows)
    return (model(x) - y).square().mean()


class Trial:
    """A model that is made block-sparse, and notes of its training.

    Args:
        model: made by `mlp` if not given.
        settings: two-phase if not given.
    """

    def __init__(self, model: nn.Module | None = None, settings: SparsityConfig | None = None) -> None:
        self.model = model or mlp()
        self.sparsifier = sparsify_(self.model, settings or config())
        self.losses: list[float] = []
        self._lifted: dict[str, Tensor] = {}  # dense weights when values of blocks were first seen
        self._reached: dict[str, Tensor] = {}  # blocks whose values have had a gradient since

    def adam(self, **settings: Any) -> torch.optim.AdamW:
        """The optimiser that docs/training.md recommends, attached."""
        optimizer = torch.optim.AdamW(parameter_groups(self.model, lr=1e-2), **settings)
        self.attach(optimizer)
        return optimizer

    def attach(self, optimizer: Any, **settings: Any) -> None:
        self.sparsifier.attach(optimizer, total_steps=STEPS, **settings)

    def step(self, *optimizers: torch.optim.Optimizer, model: Any = None) -> None:
        """An ordinary step."""
        loss = loss_of(model or self.model) + self.sparsifier.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        check_gradients(self.sparsifier)
        for optimizer in optimizers:
            optimizer.step()
        self.note(loss)

    def train(self, *optimizers: torch.optim.Optimizer, model: Any = None, falls: bool = True) -> None:
        """All steps that are left, and the checks."""
        while self.sparsifier.step < STEPS:
            before = self.sparsifier.step
            self.step(*optimizers, model=model)
            assert self.sparsifier.step == before + 1
        self.check(falls=falls)

    def note(self, loss: Tensor | float) -> None:
        """After each step of the optimiser."""
        self.losses.append(loss.item() if isinstance(loss, Tensor) else loss)
        for target in self.sparsifier.targets:
            layer = target.module
            if not isinstance(layer, BlockSparseLinear):
                continue
            if target.name not in self._lifted:
                self._lifted[target.name] = layer.dense_weight().detach().clone()
                self._reached[target.name] = torch.zeros_like(layer.block_mask)
            elif layer.values.grad is not None:
                slots = layer.values.grad.flatten(1).any(1)
                self._reached[target.name].view(-1)[layer.block_position[slots]] = True

    def check(self, sparsity: float = SPARSITY, falls: bool = True) -> None:
        """What must hold after any whole training."""
        assert self.sparsifier.sparsity == sparsity == share_of_zeros(self.sparsifier)
        assert all(torch.isfinite(p).all() for p in self.model.parameters())
        check_layers_agree(self.model)
        if falls and len(self.losses) > 10:
            assert sum(self.losses[-5:]) < sum(self.losses[:5])
        for name, before in self._lifted.items():
            layer = self.model.get_submodule(name)
            moved = (layer.grid.to_blocks(layer.dense_weight().detach() - before) != 0).flatten(2).any(2)
            assert moved.any() and moved[self._reached[name] & layer.block_mask].all(), f"lifted values of {name} do not train"


def share_of_zeros(sparsifier: Any) -> float:
    """Of blocks, counted in the dense weights."""
    dead = blocks = 0
    for target in sparsifier.targets:
        module = target.module
        weight = module.dense_weight() if isinstance(module, BlockLayer) else module.weight
        dead += int((~(target.grid.to_blocks(weight.detach()) != 0).flatten(2).any(2)).sum())
        blocks += target.grid.blocks
    return dead / blocks


def check_gradients(sparsifier: Any) -> None:
    """Dead blocks have gradients of exactly zero, and some gradient there is."""
    for target in sparsifier.targets:
        for parameter, where in target.module.block_entries(~target.mask) if isinstance(target.module, BlockLayer) else []:
            if parameter.grad is not None:
                assert not parameter.grad[where].any()
        if isinstance(target.module, nn.Linear):
            gradient = target.grid.to_blocks(target.module.weight.grad)
            assert gradient[target.mask].any() and not gradient[~target.mask].any()


def same_output(one: Any, other: Any, x: Tensor | None = None) -> bool:
    """Whether two models compute the same, up to rounding."""
    x = batch(8)[0] if x is None else x
    with torch.no_grad():
        return torch.allclose(one(x), other(x), rtol=1e-4, atol=1e-5)


def trained(settings: SparsityConfig | None = None, steps: int = STEPS) -> Trial:
    """A training that has ended, or come so far."""
    trial = Trial(settings=settings)
    optimizer = trial.adam()
    for _ in range(steps):
        trial.step(optimizer)
    return trial
