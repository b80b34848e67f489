"""The lift under `fully_shard`, where parameters cannot be replaced: the model is built again between two training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.algorithms.training.attachment import PART, number_parts_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.core.errors import KronblocksError
from kronblocks.core.shards import rows_here, whole
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery.carried_moments import lifted_state


@torch.no_grad()
def lifted_anew(
    sparsifier: Sparsifier,
    optimizer: Optimizer,
    *,
    build: Callable[[], tuple[nn.Module, Sparsifier]],
    shard: Callable[[nn.Module], Any],
    make_optimizer: Callable[[nn.Module], Optimizer],
) -> tuple[nn.Module, Sparsifier, Optimizer]:
    """Lift when `sparsifier.lift_due` says so: gather the weights, build the model again, lift it, shard it.

    Parameters that still exist keep their moments, and values get those that follow from their factors'. Groups of the same
    `parameter_groups` call, or of the same name and order, keep their learning rates and other options. So a new
    learning-rate scheduler works with the state of the old one. Every rank holds the whole model in memory for a moment. Call
    `attach` on the new sparsifier afterwards.

    Args:
        sparsifier: of the sharded model.
        optimizer: the present one.
        build: makes the model and its sparsifier as at the start, not sharded.
        shard: calls `fully_shard` as at the start.
        make_optimizer: makes the optimiser as at the start.

    Returns:
        The model, its sparsifier and its optimiser.

    Raises:
        KronblocksError: no lift is due.
    """
    if not sparsifier.lift_due:
        raise KronblocksError("no lift is due: call this when sparsifier.lift_due is True, not before")
    old = sparsifier.model
    weights = {name: whole(tensor).cpu() for name, tensor in old.state_dict().items()}
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    memory = {names[id(p)]: {key: _whole(value) for key, value in state.items()} for p, state in optimizer.state.items()}
    options = {key: {k: v for k, v in g.items() if k not in _OWN} for key, g in _identified(optimizer)}

    model, new = build()
    new.load_state_dict(sparsifier.state_dict())
    model.load_state_dict(weights)
    factored = {name: layer for name, layer in model.named_modules() if isinstance(layer, KroneckerBlockLinear)}
    new.lift_()
    for name, layer in factored.items():
        lifted = model.get_submodule(name)
        if isinstance(lifted, BlockSparseLinear) and f"{name}.coeff" in memory:
            memory[f"{name}.values"] = lifted_state(memory[f"{name}.coeff"], layer, lifted) or {}
    shard(model)
    following = make_optimizer(model)
    for key, group in _identified(following):
        group.update(options.get(key, {}))
    for name, parameter in model.named_parameters():
        if memory.get(name):
            following.state[parameter] = {key: _like(value, parameter) for key, value in memory[name].items()}
    return model, new, following


_OWN = ("params", "param_names")  # options that groups of the new optimiser keep


def _identified(optimizer: Optimizer) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Groups, identified by part of the model, name, and position among those of the same part and name."""
    number_parts_([optimizer])
    kinds = [(group.get(PART), group.get("name")) for group in optimizer.param_groups]
    return [((*kind, kinds[:place].count(kind)), optimizer.param_groups[place]) for place, kind in enumerate(kinds)]


def _whole(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """Shard a moment like its parameter; other state is unchanged."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    moment = torch.zeros_like(parameter)
    local, rows = rows_here(moment)
    local.copy_(value[rows])
    return moment
