"""The rows of a tensor that this process holds, under `fully_shard`. The only file that knows how torch shards."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kronblocks.core.errors import KronblocksError


class Rows(NamedTuple):
    """The rows of a tensor that this process holds: all of them, unless it is sharded."""

    local: Tensor  # shares its memory
    where: slice


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor."""
    return hasattr(tensor, "placements")


def rows_here(tensor: Any) -> Rows:
    """The rows that this process holds.

    Raises:
        KronblocksError: the tensor is cut along another dimension than the first.
    """
    if not is_sharded(tensor):
        return Rows(tensor, slice(0, tensor.shape[0]))
    start, stop = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0):
            raise KronblocksError(
                f"block layers may be sharded by rows only, as fully_shard(model) does, not as {placement}: leave them out of "
                "the tensor-parallel plan"
            )
        size = -(-(stop - start) // tensor.device_mesh.size(dim))  # as torch.chunk
        start = min(start + size * tensor.device_mesh.get_local_rank(dim), stop)
        stop = min(start + size, stop)
    return Rows(tensor.to_local(), slice(start, stop))


def assembled(local: Tensor, like: Any) -> Tensor:
    """Gather `local`, computed row by row from `rows_here(like)`: all rows, on every process."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local.contiguous(), like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()


def summed(local: Tensor, like: Any) -> Tensor:
    """Sum `local`, computed from `rows_here(like)`, over the processes."""
    if not is_sharded(like):
        return local
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placement.is_replicate() else Partial() for placement in like.placements]
    return DTensor.from_local(local.contiguous(), like.device_mesh, placements).full_tensor()


def whole(tensor: Any) -> Tensor:
    """The whole tensor, on every process."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
