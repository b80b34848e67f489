"""Several processes with one model: they decide alike, and what wraps the model follows when layers are replaced."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from kronblocks.errors import KronblocksError

_AGREE = 1e-3  # of the largest score: what ranks with the same weights may differ by


def is_shared() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def agreed(scores: Sequence[Tensor], step: int) -> list[Tensor]:
    """Rank 0's scores on every rank. Only these grids travel, never weights.

    Raises:
        KronblocksError: ranks hold other weights than rank 0.
    """
    if not is_shared():
        return list(scores)
    own = torch.cat([score.flatten().to(scores[0].device, torch.float64) for score in scores])
    first = own.clone()
    distributed.broadcast(first, src=0)
    apart = torch.stack([(own - first).abs().max(), first.abs().max()]) if own.numel() else own.new_zeros(2)
    distributed.all_reduce(apart, op=distributed.ReduceOp.MAX)
    if apart[0] > _AGREE * apart[1]:
        raise KronblocksError(
            f"at step {step} the ranks hold different weights, so their gradients are not averaged: wrap the model in "
            "DistributedDataParallel or fully_shard after sparsify_, and call the wrapped model, not the bare one"
        )
    return _like(first, scores)


@torch.no_grad()
def averaged(scores: Sequence[Tensor]) -> list[Tensor]:
    """Root mean squares over the ranks, of scores that each took from its own share of the batch."""
    if not is_shared():
        return list(scores)
    squares = torch.cat([score.flatten().double().square() for score in scores])
    distributed.all_reduce(squares)
    return _like((squares / distributed.get_world_size()).sqrt(), scores)


def _like(flat: Tensor, scores: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device, score.dtype) for part, score in zip(parts, scores, strict=True)]


@torch.no_grad()
def broadcast_(tensor: Tensor) -> Tensor:
    """Rank 0's values in this tensor, on every rank; bool ones too."""
    if is_shared():
        box = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        distributed.broadcast(box, src=0)
        tensor.copy_(box)
    return tensor


def around(model: nn.Module, given: nn.Module | None = None) -> list[ref[Any]]:
    """Every DistributedDataParallel that a model is inside of, in weak references.

    Args:
        model: nothing in it knows of its wrapper, which is looked for among all objects of the process, if none is given.
        given: the wrapper, or what is around it in turn.

    Raises:
        KronblocksError: the model is in none of what is given.
    """
    if given is None and not (distributed.is_available() and distributed.is_initialized()):
        return []
    among = _all_objects() if given is None else given.modules()
    wrappers: list[Any] = [each for each in among if issubclass(type(each), DistributedDataParallel)]
    found = [ref(wrapper) for wrapper in wrappers if any(module is model for module in wrapper.module.modules())]
    if given is not None and not found:
        raise KronblocksError(
            f"ddp= is a {type(given).__name__} without a DistributedDataParallel around the model that sparsify_ got: write "
            "ddp=DistributedDataParallel(model), the one that the training loop calls, or leave it out"
        )
    return found


def _all_objects() -> list[Any]:
    if gc.get_freeze_count() == 0:
        return gc.get_objects()
    gc.unfreeze()  # gc.freeze() hides objects
    found = gc.get_objects()
    gc.freeze()
    return found


def follow_replaced_parameters(model: nn.Module, wrappers: list[ref[Any]]) -> None:
    """Let the DistributedDataParallel around a model, one of one process too, average the gradients that it has now.

    Args:
        model: whose layers were replaced.
        wrappers: those that `around` found; filled where none is there any more, as where the model was wrapped later.
    """
    if all(reference() is None for reference in wrappers):
        wrappers[:] = around(model)
    for wrapper in (reference() for reference in wrappers):
        if wrapper is None:
            continue
        wrapper._static_graph_delay_allreduce_enqueued = False  # a static graph's first iteration comes once more
        parameters, sparse = wrapper._build_params_for_reducer()  # from here on what unpickling does: a new reducer over those
        names = wrapper._build_debug_param_to_name_mapping(parameters)
        wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
        if wrapper.static_graph:
            wrapper.reducer._set_static_graph()
            wrapper.logger._set_static_graph()
        for hook, state in wrapper._comm_hooks:
            distributed._register_comm_hook(wrapper.reducer, state, hook)
