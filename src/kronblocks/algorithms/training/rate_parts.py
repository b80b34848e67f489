"""Cut the groups of an optimiser into parts of one rate each, for one step, and write back what the step writes into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kronblocks.algorithms.training.places import same
from kronblocks.algorithms.training.stand_in import Group

RATES = "rates"
"""Key in an optimiser's group: how its rate is meant for sparse layers ("auto", "adam", "sgd"). Without it nothing is scaled."""
MOST_PARTS = 32
"""Parts of a group with rates of their own. Beyond that, rates are rounded, since each part is a call of a fused kernel."""

_POWERS = {"lr": 1.0, "weight_decay": -1.0, "lr_max": 1.0, "scheduled_lr": 1.0}
"""By which power of the factor to scale what is in a group. The last two are of schedule-free optimisers."""
_LISTS = ("params", "param_names")


class Part:
    """Parameters of a group that share a rate.

    Args:
        origin: the group.
        factor: their rate, relative to the group's.
        places: theirs in the group.
    """

    def __init__(self, origin: Group, factor: float, places: Sequence[int]) -> None:
        self._origin, self.factor, self.places = origin, factor, places
        self._own = {name: [origin[name][place] for place in places] for name in _LISTS if name in origin}
        self._rate: Tensor | None = None
        self.group: Group = {}  # the same object at each step, as compiled steps like it

    def begin(self) -> Group:
        """The part as a group of its own, with the present settings of the whole group."""
        self._given = {name: self._scaled(name, value, self.factor) for name, value in self._origin.items()} | self._own
        self.group.clear()
        self.group.update(self._given)
        return self.group

    def end(self) -> None:
        """Write into the group what the step has written into the part."""
        for name, value in self.group.items():
            if name not in self._own and value is not self._given.get(name):
                self._origin[name] = self._scaled(name, value, 1 / self.factor)

    def _scaled(self, name: str, value: Any, factor: float) -> Any:
        power = self._power(name)
        if not power or isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            return value
        if name != "lr" or not isinstance(value, Tensor) or value.requires_grad or factor != self.factor:
            return value * factor**power
        if self._rate is None or self._rate.device != value.device:
            self._rate = value.detach().clone()
        return self._rate.copy_(value).mul_(factor)

    def _power(self, name: str) -> float:
        if name == "weight_sum":  # of a schedule-free optimiser: a sum of powers of its rates
            return float(self._origin.get("weight_lr_power", 0))
        return 0.0 if name == "weight_decay" and self._origin.get("fixed_decay") else _POWERS.get(name, 0.0)


class Parts:
    """An optimiser's groups in parts. They serve as long as parameters and factors stay.

    Args:
        groups: all groups, in order. Those without the key `RATES` stay whole.
        factors: the rates of parameters, by id, relative to the group's rate; 1 if missing.
    """

    def __init__(self, groups: Sequence[Group], factors: Mapping[int, float]) -> None:
        self._from = [(group, list(group["params"]), group.get(RATES)) for group in groups]
        self._parts = [
            [Part(group, factor, places) for factor, places in cut.items()]
            if (cut := _cut(group, factors)).keys() - {1.0}
            else group
            for group in groups
        ]

    def change_(self, factors: Mapping[int, float]) -> bool:
        """Give the same parts other factors. Whether that is possible, since the same parameters belong together."""
        for (group, *_), parts in zip(self._from, self._parts, strict=True):
            cut = _cut(group, factors)
            if isinstance(parts, dict) if cut.keys() - {1.0} else not isinstance(parts, dict):
                return False
            if not isinstance(parts, dict):
                if [part.places for part in parts] != list(cut.values()):
                    return False
                for part, factor in zip(parts, cut, strict=True):
                    part.factor = factor
        return True

    def is_of(self, groups: Sequence[Group]) -> bool:
        """Whether the groups are still these, with the same parameters."""
        return len(groups) == len(self._from) and all(
            group is then and group.get(RATES) == rates and same(group["params"], params)
            for group, (then, params, rates) in zip(groups, self._from, strict=True)
        )

    @property
    def are_whole(self) -> bool:
        """Whether no rate differs from its group's."""
        return all(isinstance(each, dict) for each in self._parts)

    def begin(self) -> list[Group]:
        """The groups for a step."""
        return [group for each in self._parts for group in ([each] if isinstance(each, dict) else [p.begin() for p in each])]

    def end(self) -> None:
        """Write back what the step has written."""
        for each in self._parts:
            for part in [] if isinstance(each, dict) else each:
                part.end()


def _cut(group: Group, factors: Mapping[int, float]) -> dict[float, list[int]]:
    """The places of a group's parameters by the factor of their rate."""
    if RATES not in group:
        return {}
    exact = wanted = [factors.get(id(p), 1.0) for p in group["params"]]
    for an_octave in (16, 8, 4, 2, 1):
        if len(set(wanted)) <= MOST_PARTS:
            break
        wanted = [2 ** (round(an_octave * math.log2(factor)) / an_octave) for factor in exact]
    cut: dict[float, list[int]] = {}
    for place, factor in enumerate(wanted):
        cut.setdefault(factor, []).append(place)
    return cut
