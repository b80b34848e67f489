"""Small models, their task and their config."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from kronblocks import SparsityConfig
from kronblocks.search.task import SearchTask

CONFIG = SparsityConfig(rank=2, target_sparsity=0.75)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def convolutional() -> nn.Sequential:
    """Another one for the same task."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (4, 8)), nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(48, 8))


def task(lr: float = 1e-2) -> SearchTask:
    teacher = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))

    def batches(seed: int):
        generator = torch.Generator().manual_seed(seed)
        for _ in itertools.count():
            x = torch.randn(16, 32, generator=generator)
            yield x, x @ teacher.t()

    held = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    return SearchTask(
        batches, [(held, held @ teacher.t())], lambda net, batch: (net(batch[0]) - batch[1]).square().mean(1), lr=lr
    )
