"""One process of a distributed training."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from kronblocks import KronblocksError, PenaltyConfig, SparsityConfig, parameter_groups, save_pretrained, sparsify_
from kronblocks.integrations.fsdp import lifted_anew

STEPS = 24
BATCH = 16

PROXIMAL = PenaltyConfig(form="proximal")
METHODS: dict[str, dict[str, Any]] = {
    "two-phase": {"rank": 2},
    "kron-l1": {"rank": 2, "penalty": PROXIMAL},
    "group-lasso": {"penalty": PROXIMAL},
    "elastic-group-lasso": {"penalty": PenaltyConfig(form="gradient")},
    "magnitude": {},
    "static": {},
    "rigl": {},
}


FEW = ("two-phase", "rigl")
STATIC = ("two-phase", "group-lasso")


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


def optimizer_of(model: nn.Module, keep_empty: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=1e-2, keep_empty=keep_empty))


def train(
    model: nn.Module,
    sparsifier: Any,
    rank: int,
    world: int,
    optimizer: torch.optim.Optimizer | None = None,
    last: int = STEPS,
    until_lift: bool = False,
    **attach: Any,
) -> dict[str, Any]:
    """Losses of the whole batch, masks after every step."""
    optimizer = optimizer or optimizer_of(model)
    sparsifier.attach(optimizer, total_steps=STEPS, **attach)
    losses, seen = [], []
    for step in range(sparsifier.step, last):
        if until_lift and sparsifier.lift_due:
            break
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
    for method in METHODS if world == 2 else FEW:
        bare, sparsifier = make(method, seed=0 if method in ("two-phase", "kron-l1") else rank)
        torch.save(train(DistributedDataParallel(bare), sparsifier, rank, world), folder / f"ddp-{method}-{rank}.pt")


def static_graph(rank: int, world: int, folder: Path) -> None:
    """DDP that knows its graph from the first step on, with a communication hook of the user's."""
    for method in STATIC:
        bare, sparsifier = make(method)
        wrapper, calls = DistributedDataParallel(bare, static_graph=True), []

        def hook(state, bucket, calls=calls):  # DDP reads annotations, and wants types, not their names
            calls.append(1)
            return allreduce_hook(state, bucket)

        wrapper.register_comm_hook(None, hook)
        found = train(wrapper, sparsifier, rank, world)
        torch.save({**found, "calls": torch.tensor(len(calls))}, folder / f"static-{method}-{rank}.pt")


def sharded(model: nn.Module) -> nn.Module:
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    fully_shard(model)
    return model


def fsdp(rank: int, world: int, folder: Path) -> None:
    """Every method under fully_shard; two-phase is lifted between two halves."""
    for method in METHODS if world == 2 else FEW:
        model, sparsifier = make(method)
        if method == "elastic-group-lasso":
            try:
                train(sharded(model), sparsifier, rank, world)
            except KronblocksError as error:
                (folder / f"penalty-{rank}.txt").write_text(str(error))
            continue
        optimizer = optimizer_of(sharded(model))
        found = train(model, sparsifier, rank, world, optimizer, until_lift=True)
        if sparsifier.lift_due:
            found = continued(found, sparsifier, optimizer, functools.partial(make, method), rank, world)
        torch.save(found, folder / f"fsdp-{method}-{rank}.pt")


STOP = 6  # before the lift


def saved(rank: int, world: int, folder: Path) -> None:
    """The first steps, and a sharded checkpoint."""
    for method in ("two-phase", "magnitude"):
        model, sparsifier = make(method)
        optimizer = optimizer_of(sharded(model), keep_empty=False)
        train(model, sparsifier, rank, world, optimizer, last=STOP)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.save(state, checkpoint_id=folder / f"{method}-checkpoint")
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            torch.save(sparsifier.state_dict(), folder / f"{method}-sparsifier.pt")
            torch.save(whole, folder / f"{method}-whole.pt")
        try:
            save_pretrained(model, folder / f"{method}-pretrained")
        except KronblocksError as error:
            (folder / f"{method}-part-{rank}.txt").write_text(str(error))


def resumed(rank: int, world: int, folder: Path) -> None:
    """The other steps, on another number of processes."""
    for method in ("two-phase", "magnitude"):
        model, sparsifier = make(method)
        sparsifier.load_state_dict(torch.load(folder / f"{method}-sparsifier.pt", weights_only=True))
        optimizer = optimizer_of(sharded(model), keep_empty=False)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.load(state, checkpoint_id=folder / f"{method}-checkpoint")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        found = train(model, sparsifier, rank, world, optimizer, until_lift=True)
        if sparsifier.lift_due:
            found = continued(found, sparsifier, optimizer, functools.partial(make, method), rank, world)
        torch.save(found, folder / f"resumed-{method}-{rank}.pt")


def continued(found: Any, sparsifier: Any, optimizer: Any, build: Any, rank: int, world: int) -> dict[str, Any]:
    """The rest of a training whose lift is due."""
    model, sparsifier, optimizer = lifted_anew(sparsifier, optimizer, build=build, shard=sharded, make_optimizer=optimizer_of)
    rest = train(model, sparsifier, rank, world, optimizer)
    return {**rest, **{name: torch.cat([found[name], rest[name]]) for name in ("losses", "masks")}}


def unwrapped(rank: int, world: int, folder: Path) -> None:
    """The mistake of training the bare model."""
    bare, sparsifier = make("two-phase")
    try:
        train(bare, sparsifier, rank, world)
    except KronblocksError as error:
        (folder / f"unwrapped-{rank}.txt").write_text(str(error))


def alone(rank: int, world: int, folder: Path) -> None:
    """One process, as torchrun --nproc-per-node 1 starts it: wrapped, unwrapped, and with what cannot follow the lift."""
    for name, wrap in {
        "ddp": DistributedDataParallel,
        "static": functools.partial(DistributedDataParallel, static_graph=True),
        "frozen": wrapped_and_frozen,
        "fsdp": sharded,
    }.items():
        bare, sparsifier = make("two-phase")
        wrapped = wrap(bare)
        optimizer = optimizer_of(wrapped)
        found = train(wrapped, sparsifier, rank, world, optimizer, until_lift=True)
        if sparsifier.lift_due:
            found = continued(found, sparsifier, optimizer, functools.partial(make, "two-phase"), rank, world)
        torch.save(found, folder / f"alone-{name}.pt")
    bare, sparsifier = make("two-phase")
    try:
        sparsifier.attach(ZeroRedundancyOptimizer(bare.parameters(), torch.optim.AdamW, lr=1e-2), total_steps=STEPS)
    except KronblocksError as error:
        (folder / "zero.txt").write_text(str(error))
    bare, sparsifier = make("magnitude")  # no lift: it may stay
    found = train(bare, sparsifier, rank, world, ZeroRedundancyOptimizer(bare.parameters(), torch.optim.AdamW, lr=1e-2))
    torch.save(found, folder / "zero.pt")


def wrapped_and_frozen(model: nn.Module) -> nn.Module:
    """Hidden from who looks through all objects."""
    wrapper = DistributedDataParallel(model)
    gc.freeze()
    return wrapper


@contextlib.contextmanager
def nobody_searches() -> Iterator[None]:
    """Looking through all objects is an error."""
    own, gc.get_objects = gc.get_objects, None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        gc.get_objects = own


def own_group(rank: int, world: int, folder: Path) -> None:
    """DistributedDataParallel of another process group than the default one, which attach is given."""
    bare, sparsifier = make("two-phase")
    group = distributed.new_group(list(range(world)))
    wrapper = DistributedDataParallel(bare, process_group=group)
    with nobody_searches():
        found = train(wrapper, sparsifier, rank, world, ddp=nn.Sequential(wrapper))  # as torch.compile is around it
    other, sparsifier = make("two-phase")
    try:
        sparsifier.attach(optimizer_of(other), total_steps=STEPS, ddp=wrapper)
    except KronblocksError as error:
        (folder / f"another-{rank}.txt").write_text(str(error))
    torch.save(found, folder / f"group-two-phase-{rank}.pt")


SCENARIOS: dict[str, tuple[Callable[[int, int, Path], None], ...]] = {
    "one": (alone,),
    "two": (ddp, static_graph, own_group, fsdp, unwrapped, saved),
    "four": (ddp, fsdp, resumed),
}


def main(scenario: str, rank: int, world: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for run in SCENARIOS[scenario]:
        run(rank, world, folder)
    distributed.barrier()
    os._exit(0)  # gloo's threads may outlive the group that wrappers still hold
