"""A small training over a lift, or over the end of dead slots, for the tests of what goes on with its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kronblocks import SparsityConfig, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.nn.block_sparse_linear import BlockSparseLinear

STEPS = 30  # the lift comes after step 9, healing after 15
METHODS: dict[str, dict[str, Any]] = {
    "two-phase": {"rank": 2},
    "magnitude": {},
    "packed": {"method": "magnitude", "storage": "packed"},
    "regrowing": {"method": "rigl", "storage": "dense"},
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))


def made(method: str = "two-phase", block_size: int | str = 4) -> tuple[nn.Sequential, Sparsifier]:
    model = mlp()
    shared = {"method": method, "block_size": block_size, "target_sparsity": 0.75, "measure_plans": False}
    return model, sparsify_(model, SparsityConfig(**{**shared, **METHODS[method]}))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
    return (model(x) - x[:, :16].sin()).square().mean()


def run(model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, until: int = STEPS) -> None:
    for step in range(sparsifier.step, until):
        optimizer.zero_grad()
        (loss_of(model, step) + sparsifier.penalty()).backward()
        optimizer.step()


def zeros(model: nn.Module) -> float:
    """Share of exact zeros in the weights as they are, whatever a mask says."""
    weights = [layer.weight.detach().flatten() for layer in (model[0], model[2])]  # pyright: ignore[reportIndexIssue]
    return float((torch.cat(weights) == 0).float().mean())


def layers(model: nn.Sequential) -> list[BlockSparseLinear]:
    return [layer for layer in model if isinstance(layer, BlockSparseLinear)]
