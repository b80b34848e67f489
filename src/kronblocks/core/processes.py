"""Several processes that train one model, and how they come to the same decisions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

from kronblocks.core.errors import KronblocksError

_AGREE = 1e-3  # largest difference between ranks with the same weights, as a share of the largest score


def is_shared() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@torch.no_grad()
def agreed(scores: Sequence[Tensor], step: int) -> list[Tensor]:
    """Rank 0's scores, on every rank. Only score grids are sent, never weights.

    Raises:
        KronblocksError: the ranks' scores differ, so their weights do.
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
            f"at step {step} the ranks hold different weights: their gradients are not averaged. Wrap the model in "
            "DistributedDataParallel or fully_shard after sparsify_, and call the wrapped model, not the bare one"
        )
    return _like(first, scores)


@torch.no_grad()
def averaged(scores: Sequence[Tensor]) -> list[Tensor]:
    """Root mean square over the ranks of scores that each rank computed from its share of the batch."""
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
    """Overwrite a tensor (bool too) with rank 0's values, on every rank."""
    if is_shared():
        box = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        distributed.broadcast(box, src=0)
        tensor.copy_(box)
    return tensor
