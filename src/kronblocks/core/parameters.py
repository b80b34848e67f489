"""Give a parameter other values while it stays the same object, and keep or move its hooks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import CellType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class ParameterHook(NamedTuple):
    """A hook on a parameter: the table that holds it, and its key there."""

    table: str  # "_backward_hooks" of register_hook, or "_post_accumulate_grad_hooks"
    key: int
    function: Any

    @property
    def name(self) -> str:
        """Its name in messages."""
        function = self.function
        while isinstance(function, functools.partial):
            function = function.func
        return getattr(function, "__qualname__", type(function).__name__).split("<locals>.")[-1]


@torch.no_grad()
def become_(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of any shape, and no gradient. It stays the same object.

    Args:
        parameter: an ordinary one, not sharded.
        values: any shape, on any device; the parameter shares its memory from now on.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.new_empty(0, dtype=other)  # else autograd goes on expecting gradients of the old shape
    parameter.data = values.detach()


def hooks_of(parameter: nn.Parameter) -> list[ParameterHook]:
    """Every hook on a parameter, except this library's own."""
    tables = {table: getattr(parameter, table, None) or {} for table in ("_backward_hooks", "_post_accumulate_grad_hooks")}
    hooks = [ParameterHook(table, key, hook) for table, held in tables.items() for key, hook in held.items()]
    return [hook for hook in hooks if not str(getattr(hook.function, "__module__", "")).startswith("kronblocks.")]


def hooks_that_end(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[ParameterHook]]:
    """Hooks, by parameter name, that are not on all of the parameters: they end when one parameter replaces all.

    Args:
        parameters: by name, those that one parameter will replace.
    """
    hooks = {name: hooks_of(parameter) for name, parameter in parameters.items()}

    def is_on_all(hook: ParameterHook) -> bool:
        return all(any(hook.table == o.table and _alike(hook.function, o.function) for o in others) for others in hooks.values())

    ending = {name: [hook for hook in each if not is_on_all(hook)] for name, each in hooks.items()}
    return {name: each for name, each in ending.items() if each}


def drop_hooks_(parameter: nn.Parameter, hooks: list[ParameterHook]) -> None:
    """Take hooks off a parameter. Calling `remove()` on their handles afterwards is no error."""
    for hook in hooks:
        (getattr(parameter, hook.table) or {}).pop(hook.key, None)


def share_hooks_(new: nn.Parameter, old: nn.Parameter) -> None:
    """Register the hooks of `old` on `new` too. Their handles remove them from both."""
    for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if (hooks := getattr(old, table, None)) and new.requires_grad:
            setattr(new, table, hooks)


def move_to_front_(parameter: nn.Parameter, key: int) -> None:
    """Make the post-accumulate hook with this key run before the parameter's others."""
    hooks: Any = parameter._post_accumulate_grad_hooks
    own, others = hooks.pop(key), dict(hooks)
    hooks.clear()  # autograd reads in the order of insertion, whatever an OrderedDict says
    hooks.update({key: own, **others})


def _alike(one: Any, other: Any) -> bool:
    """Whether two functions do the same. A lambda registered in a loop is a new object for each parameter."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        return one.__code__ == other.__code__ and _equal(_bound(one), _bound(other))
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        given = [(*each.args, *each.keywords.items()) for each in (one, other)]
        return _alike(one.func, other.func) and _equal(*given)
    return one is other or (isinstance(one, MethodType) and one == other)


def _bound(function: FunctionType) -> tuple[Any, ...]:
    """The defaults of a function and its closure's values."""
    return (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *(function.__closure__ or ()))


def _equal(one: Any, other: Any) -> bool:
    """The same object, or plain values that are equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, CellType) and one is not other:
        return bool(one) and bool(other) and _equal(one.cell_contents, other.cell_contents)
    return one is other or (isinstance(one, str | int | float) and one == other)
