"""What tests of several rooms share: a small model and its config, an ordinary training, and what is right of it."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kronblocks import BlockSparseLinear, Rule, Sparsifier, SparsityConfig, parameter_groups, sparsify_
from kronblocks.config.methods import spec_of
from kronblocks.nn.base import BlockLayer

METHODS = ["two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl", "iterative", "magnitude", "static"]

WAYS: dict[str, dict[str, Any]] = {  # to hold blocks: factors that are lifted, a masked weight, values of blocks
    "two-phase": {"rank": 2},
    "magnitude": {},
    "packed": {"method": "magnitude", "storage": "packed"},
    "regrowing": {"method": "rigl", "storage": "dense"},
}

STEPS = 40
"""Of a whole training: two-phase lifts after 11 of them, and healing begins after 16."""


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    """Linear layers and Tanh in turns: 32 -> 64 -> 64 -> 16 if not said."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes or (32, 64, 64, 16)):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def factors(method: str, rank: int = 2) -> dict[str, int]:
    """The rank, for the methods that have one."""
    return {"rank": rank} if spec_of(method).is_factored else {}


def config(method: str = "two-phase", **settings: Any) -> SparsityConfig:
    """Blocks of 8x8, to 75% zeros, with the plans that the counts prefer."""
    return SparsityConfig(method=method, **{"block_size": 8, "target_sparsity": 0.75, "measure_plans": False, **settings})


def made(way: str = "two-phase", block_size: int | str = 4) -> tuple[nn.Sequential, Sparsifier]:
    """A model of two layers in one of these ways, with an output for each of 16 inputs."""
    model = mlp(32, 32, 16)
    return model, sparsify_(model, config(**{"method": way, "block_size": block_size, **WAYS[way]}))


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    """Of the 16 rows of a step, which the model can learn."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
    y = model(x)
    return (y - x[:, : y.shape[1]].sin()).square().mean()


def attached(model: nn.Module, sparsifier: Sparsifier, total_steps: int = STEPS) -> torch.optim.AdamW:
    """The optimiser that docs/training.md recommends, followed by the sparsifier."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=total_steps)
    return optimizer


def run(model: nn.Module, sparsifier: Sparsifier, *optimizers: torch.optim.Optimizer, until: int = STEPS) -> None:
    """All steps that are left until then."""
    for step in range(sparsifier.step, until):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (loss_of(model, step) + sparsifier.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()


def started(model: nn.Module, settings: SparsityConfig) -> tuple[Sparsifier, torch.optim.AdamW]:
    """A training that has not made a step."""
    sparsifier = sparsify_(model, settings)
    return sparsifier, attached(model, sparsifier)


def trained(model: nn.Module, settings: SparsityConfig, until: int = STEPS) -> Sparsifier:
    """A training that has ended, or come so far."""
    sparsifier, optimizer = started(model, settings)
    run(model, sparsifier, optimizer, until=until)
    return sparsifier


def zeros(model: nn.Module) -> float:
    """Share of exact zeros in the weights as they are, whatever a mask says."""
    weights = [layer.weight.detach().flatten() for layer in model.modules() if isinstance(layer, nn.Linear | BlockLayer)]
    return float((torch.cat(weights) == 0).float().mean())


def free_layers(model: nn.Module) -> list[BlockSparseLinear]:
    """Those that were lifted, or began with values of blocks."""
    return [layer for layer in model.modules() if isinstance(layer, BlockSparseLinear)]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_layers_agree(model: nn.Module) -> None:
    """Every block layer computes with the weight that it shows, and that is zero just where its mask says so."""
    for layer in model.modules():
        if isinstance(layer, BlockLayer):
            weight, bias = layer.dense_weight().detach(), layer.bias
            blocks = layer.grid.to_blocks(weight)
            assert not (blocks != 0).flatten(2).any(2)[~layer.block_mask].any()
            x = torch.randn(3, layer.in_features, dtype=weight.dtype)
            if bool(weight.isfinite().all()):
                wanted = linear(x.double(), weight.double(), None if bias is None else bias.double())
                terms = (x.double().abs() @ weight.double().abs().T) + (0 if bias is None else bias.double().abs())
                bound = 4 * (layer.in_features + (layer.rank or 1) + 4) * torch.finfo(weight.dtype).eps * terms
                assert ((layer(x).double() - wanted).abs() <= bound).all()


class Training:
    """A plain loop whose whole state can be saved and loaded."""

    def __init__(self, config: SparsityConfig, optimizer=torch.optim.AdamW, seed: int = 0, rule: Rule | None = None) -> None:
        self.model = mlp(32, 24, 16, 8, seed=seed)
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
            self.optimizer.zero_grad()
            (loss_of(self.model, step) + self.sparsifier.penalty()).backward()
            self.optimizer.step()
            self.scheduler.step()
        return self

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "sparsifier": self.sparsifier}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)
