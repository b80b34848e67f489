"""A training of some steps that tests can stop, save and go on with."""

from __future__ import annotations

import io
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks import Rule, SparsityConfig, parameter_groups, sparsify_
from kronblocks.config.methods import spec_of

STEPS = 40
METHODS = ["two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl", "iterative", "magnitude", "static"]


def factors(method: str, rank: int = 2) -> dict[str, int]:
    """The rank, for the methods that have one."""
    return {"rank": rank} if spec_of(method).is_factored else {}


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Training:
    """A plain loop whose whole state can be saved and loaded."""

    def __init__(self, config: SparsityConfig, optimizer=torch.optim.AdamW, seed: int = 0, rule: Rule | None = None) -> None:
        torch.manual_seed(seed)
        self.model = mlp(32, 24, 16, 8)
        self.sparsifier = sparsify_(self.model, config, rule=rule)
        self.make_optimizer = optimizer

    def start(self, state: dict[str, Any] | None = None, steps: int = STEPS) -> Training:
        if state is not None:  # structure first, then weights, then an optimiser over the right parameters
            self.sparsifier.load_state_dict(state["sparsifier"])
            self.model.load_state_dict(state["model"])
        self.optimizer = self.make_optimizer(parameter_groups(self.model, lr=1e-2))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.handle = self.sparsifier.attach(self.optimizer, total_steps=steps)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
        return self

    def run(self, until: int) -> Training:
        for step in range(self.sparsifier.step, until):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 32, generator=generator)
            loss = (self.model(x) - x[:, :8].sin()).square().mean() + self.sparsifier.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "sparsifier": self.sparsifier}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
