"""What is tried for each method before it is compared: a first grid, then further wherever the best lies at its edge."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kronblocks.config.sparsity import PenaltyConfig, ScheduleConfig

Settings = dict[str, Any]  # of a TrainConfig


class Axis(NamedTuple):
    """Values of one setting, in order, and which of them the first grid has."""

    name: str
    values: tuple[float, ...]
    first: slice

    def settings(self, value: float) -> Settings:
        """A value as settings of a training; those of nested tables are named "table.name"."""
        table, _, name = self.name.rpartition(".")
        return {table: _TABLES[table](**{name: value})} if table else {name: value}


_TABLES: dict[str, Any] = {"schedule": ScheduleConfig, "penalty": PenaltyConfig}


def rates(values: Sequence[float], first: slice) -> Axis:
    """An axis of learning rates."""
    return Axis("lr", tuple(values), first)


RATES = rates((1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128, 0.256, 0.512), slice(1, 4))

_RANKS = Axis("rank", (2, 4, 8, 16, 32, 64), slice(1, 3))
_DECAY = (0.0, 0.05, 0.1, 0.2)
_OTHERS: dict[str, tuple[Axis, ...]] = {  # beside the learning rate, what matters most for the method
    "dense": (Axis("weight_decay", _DECAY, slice(0, 2)),),
    "static": (Axis("weight_decay", _DECAY, slice(0, 2)),),
    "two-phase": (_RANKS,),
    **dict.fromkeys(("magnitude", "iterative"), (Axis("schedule.end", (0.1, 0.15, 0.25, 0.4, 0.7, 0.85, 0.95), slice(3, 5)),)),
    **dict.fromkeys(("group-lasso", "elastic-group-lasso"), (Axis("schedule.end", (0.1, 0.2, 0.3, 0.5, 0.8, 0.9), slice(3, 5)),)),
    "rigl": (Axis("regrow", (0.01, 0.03, 0.1, 0.3, 0.5, 0.7), slice(3, 5)),),
    "kron-l1": (_RANKS, Axis("penalty.strength", (0.1, 0.3, 1.0, 3.0, 10.0), slice(2, 3))),
}


class Space:
    """All settings of some axes by number: those of the first grid, then the others.

    >>> space = Space([rates((1e-3, 2e-3, 4e-3), slice(1, 3)), Axis("rank", (2, 4, 8), slice(1, 2))])
    >>> space.first, [space.words(number) for number in range(space.first)]
    (2, ['lr 0.002, rank 4', 'lr 0.004, rank 4'])
    >>> sorted(space.words(number) for number in space.neighbours(1))
    ['lr 0.002, rank 4', 'lr 0.004, rank 2', 'lr 0.004, rank 8']
    """

    def __init__(self, axes: Sequence[Axis]) -> None:
        self._axes = tuple(axes)
        ranges = [range(len(axis.values)) for axis in self._axes]
        first = list(itertools.product(*(positions[axis.first] for positions, axis in zip(ranges, self._axes, strict=True))))
        self.first = len(first)
        self._places = first + [place for place in itertools.product(*ranges) if place not in set(first)]

    def __len__(self) -> int:
        return len(self._places)

    def _values(self, number: int) -> list[tuple[Axis, float]]:
        return [(axis, axis.values[at]) for axis, at in zip(self._axes, self._places[number], strict=True)]

    def settings(self, number: int) -> Settings:
        """The settings of a trial."""
        return {name: setting for axis, value in self._values(number) for name, setting in axis.settings(value).items()}

    def words(self, number: int) -> str:
        """The same for a reader."""
        return words({axis.name: value for axis, value in self._values(number)})

    def neighbours(self, number: int) -> list[int]:
        """Trials that differ from one by a step along one axis."""
        place = self._places[number]
        moved = ((*place[:axis], place[axis] + step, *place[axis + 1 :]) for axis in range(len(self._axes)) for step in (-1, 1))
        return [self._places.index(each) for each in moved if each in self._places]

    def described(self) -> dict[str, list[float]]:
        """Names and values of the axes."""
        return {axis.name: list(axis.values) for axis in self._axes}


def space_of(method: str) -> Space:
    """What may be tried for a method: first three learning rates, times two values of its own second setting.

    >>> {method: space_of(method).first for method in ("dense", "two-phase", "rigl")}
    {'dense': 6, 'two-phase': 6, 'rigl': 6}
    """
    return Space([RATES, *_OTHERS[method]])


def words(values: Mapping[str, Any]) -> str:
    """Plain values for a reader.

    >>> words({"lr": 0.002, "schedule.end": 0.75, "gate": True})
    'lr 0.002, schedule.end 0.75, gate True'
    """
    return ", ".join(f"{name} {value if isinstance(value, bool | str) else format(value, 'g')}" for name, value in values.items())


def describe(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, those of nested tables that differ from their defaults as "table.name".

    >>> describe({"lr": 0.002, "schedule": ScheduleConfig(end=0.75)})
    {'lr': 0.002, 'schedule.end': 0.75}
    """
    return dict(_flat(settings))


def _flat(settings: Settings) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                if getattr(value, field.name) != field.default:
                    yield f"{name}.{field.name}", getattr(value, field.name)
        else:
            yield name, value
