"""Says so, once, when an optimiser trains the layers of a sparsifier that is not attached: never yet, no more, or a copy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kronblocks.errors import KronblocksWarning
from kronblocks.sparsity.targets import BlockTarget

NOT_ATTACHED = (
    "layers are trained that a sparsifier targets which is not attached, so nothing is pruned: call "
    "sparsifier.attach(optimizer, total_steps=...), of copies of model, optimiser and sparsifier the copy's"
)
LOST = (
    "; and zeros of nn.Linear layers are lost, whose masks the sparsifier keeps: attach it again after remove(), or keep block "
    "layers, by from_pretrained(save_pretrained(model, folder, sparsifier=sparsifier))"
)


class _Unattached(Protocol):
    targets: list[BlockTarget]

    def without_attach(self) -> str: ...


_WAITING: WeakSet[Any] = WeakSet()
_HANDLES: list[Any] = []  # of the one hook on all optimisers, which is there only while somebody waits


def wait_for_attach(sparsifier: _Unattached) -> None:
    """Look at optimisers' steps until the sparsifier is attached, or nobody has it any more."""
    _WAITING.add(sparsifier)
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_post_hook(_after_any_step))


def is_attached(sparsifier: _Unattached) -> None:
    """Look no more."""
    _WAITING.discard(sparsifier)
    _stop_if_idle()


def _stop_if_idle() -> None:
    if not _WAITING and _HANDLES:
        _HANDLES.pop().remove()


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # compiled steps are not looked at
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for sparsifier in list(_WAITING):
        if _trains(held, sparsifier.targets):
            _WAITING.discard(sparsifier)
            if why := sparsifier.without_attach():
                warnings.warn(why, KronblocksWarning, stacklevel=3)
    _stop_if_idle()


def _trains(held: set[int], targets: Sequence[BlockTarget]) -> bool:
    return any(id(p) in held for target in targets for p in target.module.parameters(recurse=False))
