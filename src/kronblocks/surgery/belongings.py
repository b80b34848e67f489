"""Move hooks and attributes of users from a replaced layer to the new one, and warn of what cannot be moved."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from kronblocks.algorithms.training.places import SUCCESSOR
from kronblocks.core.errors import KronblocksWarning
from kronblocks.core.parameters import hooks_of
from kronblocks.core.tables import some
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.unfolded import UnfoldedConv, is_transposed

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
_LOST = "not_carried_over"
_OPTIONAL = frozenset({"bias", "gate"})  # parameters that may be None, and are plain attributes then
_NOT_CARRIED = _OPTIONAL | frozenset({"forward", "_hf_hook", "_old_forward", SUCCESSOR, _LOST})  # those of "hf" are accelerate's


def carry_over_(old: nn.Module, new: nn.Module) -> None:
    """Move the users' forward and backward hooks and attributes from an old module to the new one.

    What cannot be moved is noted on the new one, for `warn_of_lost_belongings`.
    """
    for hooks in _HOOKS:  # the same tables, so that handles still remove their hooks
        setattr(new, hooks, getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook
    usual = _usual(old)
    if usual is not None:
        own = vars(old).keys() - vars(usual).keys() - _NOT_CARRIED - vars(new).keys()
        vars(new).update({name: vars(old)[name] for name in own})
        if lost := _lost(old, usual):
            vars(new)[_LOST] = lost
    if (weight := old._parameters.get("weight")) is not None:
        for name, parameter in new.named_parameters(recurse=False):
            if name not in ("weight", "bias"):  # the parameters of a block layer
                vars(parameter).update(vars(weight))
    vars(old)[SUCCESSOR] = new  # not as a submodule; a sparsifier follows this


def warn_of_lost_belongings(layers: Mapping[str, nn.Module], instead: str) -> None:
    """Warn once of what the new layers, by name, lack of the old ones; `instead` says what to do."""
    found = {name: vars(layer).pop(_LOST) for name, layer in layers.items() if _LOST in vars(layer)}
    if found:
        listed = some((f"{name}: {', '.join(lost)}" for name, lost in found.items()), join="; ")
        warnings.warn(
            f"layers were replaced, and the new ones lack what the old ones had ({listed}): {instead}",
            KronblocksWarning,
            stacklevel=4,
        )


def _lost(old: nn.Module, usual: nn.Module) -> list[str]:
    """Additions to a layer, beyond a usual one of its kind, that cannot be moved to another layer, in words."""
    lost = []
    if "_hf_hook" in vars(old):
        lost.append("accelerate's hook")
    elif "forward" in vars(old):
        lost.append("a replaced forward")
    if any(len(getattr(old, hooks)) > len(getattr(usual, hooks)) for hooks in _STATE_HOOKS):
        lost.append("state_dict hooks")
    tables = ("_parameters", "_buffers", "_modules")
    if extra := [name for table in tables for name in getattr(old, table).keys() - getattr(usual, table).keys() - _OPTIONAL]:
        lost.append(" and ".join(sorted(extra)))
    weight = old._parameters.get("weight")
    if isinstance(weight, nn.Parameter) and hooks_of(weight):
        lost.append("hooks on its weight")
    return lost


def _usual(module: nn.Module) -> nn.Module | None:
    """A new layer of the same kind, for comparison; None for kinds that the library does not replace."""
    if is_transposed(module):
        kind: Any = type(module)
        with torch.device("meta"):
            return kind(1, 1)
    return _made(type(module))


@functools.cache
def _made(kind: type[nn.Module]) -> nn.Module | None:
    makers: dict[type[nn.Module], Callable[[], nn.Module]] = {
        nn.Linear: lambda: nn.Linear(1, 1, device="meta"),
        nn.Conv1d: lambda: nn.Conv1d(1, 1, 1, device="meta"),
        nn.Conv2d: lambda: nn.Conv2d(1, 1, 1, device="meta"),
        KroneckerBlockLinear: lambda: KroneckerBlockLinear(1, 1, 1, 1, device="meta"),
        BlockSparseLinear: lambda: BlockSparseLinear(1, 1, 1, device="meta"),
        UnfoldedConv: lambda: UnfoldedConv(nn.Conv2d(1, 1, 1, device="meta")),
    }
    return makers[kind]() if kind in makers else None
