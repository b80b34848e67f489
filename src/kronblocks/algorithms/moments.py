"""Change what optimisers remember of a parameter (moments): restart the parts of some blocks, or drop them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.core.shards import summed

_DIRECTIONS = frozenset({"exp_avg", "momentum_buffer", "grad_avg", "prev", "ax"})
"""Names of moments that have a direction: averages of gradients or weights. Others without a sign scale the step."""


def with_inner(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Optimisers, each followed by those that it wraps and steps (Lookahead, schedule-free wrappers)."""
    found: list[Optimizer] = []
    for optimizer in optimizers:
        inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
        found += [each for each in (optimizer, *with_inner(inner)) if all(each is not other for other in found)]
    return found


def forget_(optimizer: Optimizer, parameter: Tensor) -> None:
    """Remove all that an optimiser remembers of a parameter, from its state and from tables of its own."""
    for table, key in _places(optimizer, parameter):
        del table[key]


def _places(optimizer: Optimizer, parameter: Tensor) -> list[tuple[dict[Any, Any], Any]]:
    """Pairs of dictionary and key where an optimiser remembers a parameter: its state, and others keyed by it or its id."""
    beside = (*vars(optimizer).values(), *(each for key, each in optimizer.state.items() if isinstance(key, str)))
    tables = {id(each): each for each in beside if isinstance(each, dict) and each is not optimizer.state}
    found = [(table, key) for table in tables.values() for key in table if key is parameter or _is_id(key, parameter)]
    return [(optimizer.state, parameter), *found] if parameter in optimizer.state else found


def _is_id(key: Any, parameter: Tensor) -> bool:
    return type(key) is int and key == id(parameter)


def moments(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[tuple[str, Tensor]]:
    """The tensors of a parameter's shape that optimisers remember of it, with their names."""
    states = [optimizer.state[parameter] for optimizer in with_inner(optimizers) if parameter in optimizer.state]
    tensors = [(name, value) for state in states for name, value in state.items() if isinstance(value, Tensor)]
    return [(name, value) for name, value in tensors if value.shape == parameter.shape]


def restart_(name: str, moment: Tensor, local: Tensor, blocks: Tensor, others: Tensor) -> None:
    """Restart the part of a moment that belongs to some blocks: directions at zero, others at the mean of the other blocks.

    If the moment is sharded, every process that holds rows of it has to call this.

    Args:
        name: the optimiser's name for it.
        moment: the whole tensor, of its parameter's shape, perhaps sharded.
        local: its rows in this process; changed in place.
        blocks: bool, broadcastable to `local`: entries of the blocks that restart.
        others: bool, broadcastable to `local`: entries of the other live blocks.
    """
    if name in _DIRECTIONS:
        local.masked_fill_(blocks, 0)
        return
    others = others.expand_as(local)
    wide = torch.promote_types(local.dtype, torch.float32)  # half precision cannot count that many entries
    parts = (local.masked_fill(~others, 0), others, local < 0)
    total, number, negative = summed(torch.stack([part.sum(dtype=wide) for part in parts]), moment)
    mean = torch.where(negative > 0, 0, total / number.clamp_min(1))  # a moment with negative entries is a direction
    local.masked_fill_(blocks, mean.to(local.dtype))


def end_(name: str, moment: Tensor, local: Tensor, blocks: Tensor) -> None:
    """Zero the dead blocks' part of a moment that is a direction or a copy of the weights, since it would revive them.

    Arguments are those of `restart_`.
    """
    if name in _DIRECTIONS or float(summed((local < 0).any().float(), moment)) > 0:
        local.masked_fill_(blocks, 0)


def without_rows(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> str | None:
    """Something that an optimiser remembers of block values without one row per slot, in words; None: nothing."""
    for optimizer in with_inner(optimizers):
        for table, key in _places(optimizer, parameter):
            for name, value in _entries(table[key]):
                if not _is_small(value) and not _has_rows(value, parameter):
                    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
                    return f"{type(optimizer).__name__} keeps {name!r}{shape}"
    return None


@torch.no_grad()
def keep_rows_(optimizers: Sequence[Optimizer], parameter: nn.Parameter, kept: Tensor) -> None:
    """Remove the freed slots of block values from what optimisers remember.

    Args:
        optimizers: those that may hold the parameter. `without_rows` is None for them.
        parameter: (new capacity, bm, bn), the values after `compact_`.
        kept: (new capacity,) the slots that were kept.
    """

    def rows_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if _is_small(value) else value.index_select(0, kept.to(value.device))
        if isinstance(value, dict):
            value.update({key: rows_of(each) for key, each in value.items()})  # in place: a wrapped optimiser may share it
            return value
        return type(value)(map(rows_of, value)) if type(value) in (list, tuple) else value

    places = [place for optimizer in with_inner(optimizers) for place in _places(optimizer, parameter)]
    for table, key in {id(table[key]): (table, key) for table, key in places}.values():
        table[key] = rows_of(table[key])


def _entries(state: Any, name: str = "a table") -> Iterator[tuple[str, Any]]:
    """All values in a state, within lists and dictionaries too, with their innermost names."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from _entries(value, str(key))
    elif type(state) in (list, tuple):
        for value in state:
            yield from _entries(value, name)
    else:
        yield name, state


def _is_small(value: Any) -> bool:
    """Whether a value describes the parameter as a whole: a number, a text, or None."""
    return value.numel() <= 1 if isinstance(value, Tensor) else value is None or isinstance(value, bool | int | float | str)


def _has_rows(value: Any, values: Tensor) -> bool:
    """Whether a value certainly has one row per slot: it has the shape of the values, or that of averages over blocks."""
    if type(value) is not Tensor:
        return False
    if value.shape == values.shape:
        return True
    slots, rows, cols = values.shape
    a_number = {(slots,), (slots, 1), (slots, 1, 1)} if slots != rows * cols else set()  # else it may be an average over blocks
    a_side = {(slots, rows), (slots, cols), (slots, rows, 1), (slots, 1, cols)}
    return slots not in (rows, cols) and tuple(value.shape) in a_number | a_side
