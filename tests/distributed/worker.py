"""One process of a distributed training, started by the tests: python worker.py SCENARIO RANK WORLD FOLDER."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kronblocks import KronblocksError, SparsityConfig, parameter_groups, sparsify_

STEPS = 50
BATCH = 16

METHODS: dict[str, dict[str, Any]] = {
    "two-phase": {"rank": 2},
    "kron-l1": {"rank": 2},
    "group-lasso": {},
    "magnitude": {},
    "static": {},
    "rigl": {},
}


def make(method: str, seed: int = 0) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    torch.manual_seed(seed)
    shared = {"block_size": 4, "target_sparsity": 0.75, "measure_plans": False}
    return model, sparsify_(model, SparsityConfig(method=method, **shared, **METHODS[method]))


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """This rank's share of the step's batch."""
    x = torch.randn(BATCH, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    share = x.chunk(world)[rank]
    return share, share[:, :8].sin()


def masks(sparsifier: Any) -> Tensor:
    return torch.cat([target.mask.flatten() for target in sparsifier.targets]).clone()


def train(model: nn.Module, sparsifier: Any, rank: int, world: int, steps: range = range(STEPS)) -> dict[str, Any]:
    """Losses of the whole batch, masks after every step."""
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    losses, seen = [], []
    for step in steps:
        x, y = batch(step, rank, world)
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        (loss + sparsifier.penalty()).backward()
        optimizer.step()
        whole = loss.detach().clone()
        if world > 1:
            distributed.all_reduce(whole)
        losses.append(whole / world)
        seen.append(masks(sparsifier))
    return {"losses": torch.stack(losses), "masks": torch.stack(seen), "sparsity": torch.tensor(sparsifier.sparsity)}


def ddp(rank: int, world: int, folder: Path) -> None:
    """Every method; random choices of the ranks differ, until they are shared."""
    for method in METHODS:
        bare, sparsifier = make(method, seed=0 if method in ("two-phase", "kron-l1") else rank)
        torch.save(train(DistributedDataParallel(bare), sparsifier, rank, world), folder / f"ddp-{method}-{rank}.pt")


def unwrapped(rank: int, world: int, folder: Path) -> None:
    """The mistake of training the bare model."""
    bare, sparsifier = make("two-phase")
    try:
        train(bare, sparsifier, rank, world)
    except KronblocksError as error:
        (folder / f"unwrapped-{rank}.txt").write_text(str(error))


SCENARIOS: dict[str, tuple[Callable[[int, int, Path], None], ...]] = {"two": (ddp, unwrapped), "four": (ddp,)}


def main(scenario: str, rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for run in SCENARIOS[scenario]:
        run(rank, world, folder)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
