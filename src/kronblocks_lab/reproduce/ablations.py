"""What is varied of one method: of two-phase one setting at a time, to find its defaults by evidence; of others their forms."""

from __future__ import annotations

import dataclasses
from typing import Any

from kronblocks.config.sparsity import PenaltyConfig, ScheduleConfig
from kronblocks_lab.reproduce.trials import Settings

DEFAULT = "as it is"

_SCHEDULE = ScheduleConfig(start=0.05, end=0.5, lift_at=2 / 3, shape="cubic", update_every=50)

BASE: Settings = {
    "lr": 4e-3, "weight_decay": 0.0, "factor_weight_decay": 0.0, "factor_lr_scale": 1.5, "lifted_lr_scale": 1.5, "rank": 4,
    "tile_groups": "per-row", "init": "random", "gate": False, "score": "norm", "regrow": 0.0, "scope": "global",
    "schedule": _SCHEDULE,
}  # fmt: skip
"""What is varied: named in full, so that a change of the defaults does not change what was measured."""


def _schedule(**changes: Any) -> ScheduleConfig:
    return dataclasses.replace(_SCHEDULE, **changes)


_A: Settings = {"factor_lr_scale": 1.0, "regrow": 0.1, "schedule": _schedule(update_every=25)}

_SHIPPED: Settings = {**dict.fromkeys(BASE), "scope": "global", "schedule": ScheduleConfig()}

VARIANTS: dict[str, Settings] = {
    DEFAULT: {},
    "score: gradient times weight": {"score": "taylor"},
    "gates": {"gate": True},
    "gates, score: |S|": {"gate": True, "score": "gate"},
    "init: spectral, variance matched": {"init": "spectral"},
    "init: nearest to the dense init": {"init": "nearest"},
    "tile banks: 1": {"tile_groups": 1},
    "tile banks: 4": {"tile_groups": 4},
    "rank 1": {"rank": 1},
    "rank 2": {"rank": 2},
    "rank 8": {"rank": 8},
    "rate of factors x1": {"factor_lr_scale": 1.0},
    "rate of factors x3": {"factor_lr_scale": 3.0},
    "rate after the lift x1": {"lifted_lr_scale": 1.0},
    "rate after the lift x3": {"lifted_lr_scale": 3.0},
    "lift at 1/3 of pruning": {"schedule": _schedule(lift_at=1 / 3)},
    "lift at the end of pruning": {"schedule": _schedule(lift_at=1.0)},
    "pruning from the start": {"schedule": _schedule(start=0.0)},
    "pruning from 0.2": {"schedule": _schedule(start=0.2)},
    "pruning until 0.35": {"schedule": _schedule(end=0.35)},
    "pruning until 0.65": {"schedule": _schedule(end=0.65)},
    "pruning until 0.8": {"schedule": _schedule(end=0.8)},
    "linear schedule": {"schedule": _schedule(shape="linear")},
    "staircase schedule": {"schedule": _schedule(shape="staircase")},
    "masks every 25 steps": {"schedule": _schedule(update_every=25)},
    "masks every 100 steps": {"schedule": _schedule(update_every=100)},
    "regrowth of 0.1": {"regrow": 0.1},
    "regrowth of 0.3": {"regrow": 0.3},
    "decay of values 0.05": {"lifted_weight_decay": 0.05},
    "decay of factors and values 0.05": {"factor_weight_decay": 0.05},
    "a budget for each layer": {"scope": "layer"},
    "A: factors x1, masks every 25, regrowth of 0.1": _A,
    "A and gates": {**_A, "gate": True},
    "A and decay of factors and values 0.05": {**_A, "factor_weight_decay": 0.05},
    "A, pruning from the start until 0.4": {**_A, "schedule": _schedule(start=0.0, end=0.4, update_every=25)},
    "A, pruning until 0.4, rank 8": {**_A, "schedule": _schedule(end=0.4, update_every=25), "rank": 8},
    "decay of factors 0.05": {"factor_weight_decay": 0.05, "lifted_weight_decay": 0.0},
    "rate of factors x1, rate after the lift x1": {"factor_lr_scale": 1.0, "lifted_lr_scale": 1.0},
    "as shipped: every setting left out": _SHIPPED,
    "rate of tiles half that of coefficients": {"tile_lr_scale": 0.5},
    "rate of tiles twice that of coefficients": {"tile_lr_scale": 2.0},
    "rate of tiles a quarter of that of coefficients": {"tile_lr_scale": 0.25},
    "as shipped, rate of tiles half that of coefficients": {**_SHIPPED, "tile_lr_scale": 0.5},
    "as shipped, rank 4": {**_SHIPPED, "rank": 4},
    "as shipped, rank 8": {**_SHIPPED, "rank": 8},
}
"""Name to the settings that differ from the default method."""


def _forms(first: str, *strengths: float) -> dict[str, Settings]:
    """A method's penalty in both forms, that in the loss with several strengths; the one it has by default comes first."""
    proximal = {"proximal": {"penalty": PenaltyConfig(form="proximal")}}
    gradient = {f"in the loss, strength {x:g}": {"penalty": PenaltyConfig(form="gradient", strength=x)} for x in strengths}
    both = proximal | gradient
    return {first: both.pop(first), **both}


GROUP_LASSO_FORMS = _forms("proximal", 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
KRON_L1_FORMS = _forms("in the loss, strength 1", 0.1, 0.3, 1.0, 3.0, 10.0)

FACTOR_RATES: dict[str, Settings] = {
    f"rate {lr:g}, of factors x{scale:g}": {"lr": lr, "factor_lr_scale": scale}
    for lr in (5e-4, 2.5e-4)
    for scale in (1.0, 4.0, 16.0)
}
"""Of transformers, whose dense rates are some ten times lower than the MLP's."""
