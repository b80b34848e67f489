"""StandIn: an optimiser's step sees groups of its own, while everybody else sees those that the user made."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

Group = dict[str, Any]


class StandIn:
    """What a step gets as `self`: an object of the optimiser's class with the same attributes, but with other groups.

    Torch gives a step pre-hook the step's arguments, and the first of them is the optimiser. So nothing has to be put back,
    even after an error in the step.
    """

    __slots__ = ("groups", "original")

    groups: list[Group]
    original: Optimizer

    @property
    def param_groups(self) -> list[Group]:
        """The groups for this step."""
        return self.groups

    def __del__(self) -> None:
        """The optimiser ends itself."""


_CLASSES: WeakKeyDictionary[type, type] = WeakKeyDictionary()


def stand_in_for(optimizer: Optimizer, groups: list[Group]) -> Any:
    """A stand-in for an optimiser, or for another stand-in, with these groups."""
    real = original(optimizer)
    kind = type(real)
    if kind not in _CLASSES:
        _CLASSES[kind] = type(kind.__name__, (StandIn, kind), {"__slots__": (), "__module__": kind.__module__})
    made = object.__new__(_CLASSES[kind])
    made.__dict__ = real.__dict__  # what the step writes into itself is written into the optimiser
    made.groups, made.original = groups, real
    return made


def original(optimizer: Any) -> Any:
    """The optimiser that another object stands in for, or the object itself."""
    return optimizer.original if isinstance(optimizer, StandIn) else optimizer
