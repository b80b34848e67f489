"""What is tried for each method before it is compared: as many settings for one as for another, chosen on validation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from kronblocks.config import ScheduleConfig

Settings = dict[str, Any]  # of a TrainConfig

RATES = (2e-3, 4e-3, 8e-3)


def _pruned_until(*ends: float) -> list[Settings]:
    return [{"schedule": ScheduleConfig(end=end)} for end in ends]


_SECOND: dict[str, list[Settings]] = {  # beside the learning rate, two values of what matters most for the method
    "dense": [{"weight_decay": 0.0}, {"weight_decay": 0.05}],
    "static": [{"factor_weight_decay": 0.0}, {"factor_weight_decay": 0.05}],  # of its free values
    "two-phase": [{"rank": 4}, {"rank": 8}],
    "magnitude": _pruned_until(0.4, 0.7),
    "iterative": _pruned_until(0.4, 0.7),
    "group-lasso": _pruned_until(0.5, 0.8),
    "elastic-group-lasso": _pruned_until(0.5, 0.8),
    "rigl": [{"regrow": 0.3}, {"regrow": 0.5}],
    "kron-l1": [{"rank": 4}, {"rank": 8}],
}


def trials(method: str) -> list[Settings]:
    """The settings that are tried for a method: three learning rates, times two values of its own second setting.

    >>> {method: len(trials(method)) for method in ("dense", "two-phase", "rigl")}
    {'dense': 6, 'two-phase': 6, 'rigl': 6}
    """
    return [{"lr": rate, **second} for rate, second in itertools.product(RATES, _SECOND[method])]


def describe(settings: Settings) -> dict[str, Any]:
    """The same as plain values, those of nested tables that differ from their defaults as "table.name".

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
