"""Warn, once, when an optimiser trains layers whose sparsifier does not follow it: not attached, or attached to others."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.nested import stepping
from kronblocks.algorithms.training.stand_in import original
from kronblocks.core.errors import KronblocksError, KronblocksWarning
from kronblocks.core.tables import some

NOT_ATTACHED = (
    "layers are trained while their sparsifier is not attached, so nothing is pruned: call "
    "sparsifier.attach(optimizer, total_steps=...). A copied model needs its copied sparsifier and optimiser"
)
LOST = (
    ". Zeros of nn.Linear layers are lost, since only the sparsifier has their masks: attach it again after remove(), or make "
    "block layers by from_pretrained(save_pretrained(model, folder, sparsifier=sparsifier))"
)

STRANGER = (
    "{kind} steps {names}, which a sparsifier follows through another optimiser: it changes dead blocks, and its steps "
    "do not count. Give attach all optimisers in one list, sparsifier.attach([one, two], total_steps=...). If it replaces "
    "the other one, call remove() on the handle of the first attach, and attach the sparsifier to the new one"
)
BEFORE_LIFT = ". It is an error here, because the lift is still to come, which would leave it with parameters of other shapes"


class _Unattached(Protocol):
    targets: list[BlockTarget]

    @property
    def lift_to_come(self) -> bool: ...

    def without_attach(self) -> str: ...


_WAITING: WeakSet[Any] = WeakSet()
_ATTACHED: WeakKeyDictionary[Any, _Optimizers] = WeakKeyDictionary()
_HANDLES: list[Any] = []  # of the one hook on all optimisers, which exists only while a sparsifier needs it


class _Optimizers:
    """The optimisers that a sparsifier follows, and those that were checked."""

    def __init__(self, followed: Sequence[Optimizer]) -> None:
        self.followed, self.known = WeakSet(followed), WeakSet[Optimizer]()


def wait_for_attach(sparsifier: _Unattached) -> None:
    """Check optimisers' steps until the sparsifier is attached or freed."""
    _WAITING.add(sparsifier)
    _look()


def is_attached(sparsifier: _Unattached, optimizers: Sequence[Optimizer]) -> None:
    """Check from now on whether other optimisers step the sparsifier's layers."""
    _WAITING.discard(sparsifier)
    _ATTACHED[sparsifier] = _Optimizers(optimizers)
    _look()


def is_detached(sparsifier: _Unattached) -> None:
    """Stop checking."""
    _ATTACHED.pop(sparsifier, None)
    _stop_if_idle()


def attached() -> list[tuple[Any, WeakSet[Optimizer]]]:
    """The sparsifiers that are attached now, each with the optimisers that it follows."""
    return [(each, others.followed) for each, others in _attached()]


def _attached() -> list[tuple[Any, _Optimizers]]:
    keys = [reference() for reference in _ATTACHED.keyrefs()]  # a copy: other threads attach and detach
    return [(each, others) for each in keys if each is not None and (others := _ATTACHED.get(each)) is not None]


def _look() -> None:
    if not _HANDLES:
        _HANDLES.append(register_optimizer_step_post_hook(_after_any_step))


def _stop_if_idle() -> None:
    if not _WAITING and not _ATTACHED and _HANDLES:
        _HANDLES.pop().remove()


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():  # compiled steps are not checked
        return
    optimizer = original(optimizer)
    for sparsifier, others in _attached():
        if optimizer not in others.known:
            _look_at(optimizer, sparsifier, others)
    if _WAITING:
        held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        for sparsifier in list(_WAITING):
            if _trains(held, sparsifier.targets):
                _WAITING.discard(sparsifier)
                if why := sparsifier.without_attach():
                    warnings.warn(why, KronblocksWarning, stacklevel=3)
    _stop_if_idle()


def _look_at(optimizer: Optimizer, sparsifier: _Unattached, others: _Optimizers) -> None:
    """At an optimiser's first step: warn if it should be followed, and neither it nor its wrapper or inner optimiser is.

    Raises:
        KronblocksError: it should be, and the lift is still to come.
    """
    together = list(stepping())
    if any(each in others.followed for each in together):
        for each in together:
            others.known.add(each)
        return
    others.known.add(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    names = [target.name for target in sparsifier.targets if any(id(p) in held for p in target.parameters())]
    if names and sparsifier.without_attach():
        words = STRANGER.format(kind=type(optimizer).__name__, names=some(names))
        if sparsifier.lift_to_come:
            others.known.discard(optimizer)  # its next step is refused, too
            raise KronblocksError(words + BEFORE_LIFT)
        warnings.warn(words, KronblocksWarning, stacklevel=4)


def _trains(held: set[int], targets: Sequence[BlockTarget]) -> bool:
    return any(id(p) in held for target in targets for p in target.module.parameters(recurse=False))
