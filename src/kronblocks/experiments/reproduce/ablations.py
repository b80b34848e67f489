"""What is varied of the default method, one setting at a time, to find its defaults by evidence."""

from __future__ import annotations

from kronblocks.config import ScheduleConfig
from kronblocks.experiments.reproduce.trials import Settings

DEFAULT = "as it is"

VARIANTS: dict[str, Settings] = {
    DEFAULT: {},
    "score: gradient times weight": {"score": "taylor"},
    "gates": {"gate": True},
    "gates, score: |S|": {"gate": True, "score": "gate"},
    "init: spectral, variance matched": {"init": "spectral"},
    "init: nearest to the dense init": {"init": "nearest"},
    "tile banks: 1": {"tile_groups": "1"},
    "tile banks: 4": {"tile_groups": "4"},
    "rank 1": {"rank": 1},
    "rank 2": {"rank": 2},
    "rank 8": {"rank": 8},
    "rate of factors x1": {"factor_lr_scale": 1.0},
    "rate of factors x3": {"factor_lr_scale": 3.0},
    "rate after the lift x1": {"lifted_lr_scale": 1.0},
    "rate after the lift x3": {"lifted_lr_scale": 3.0},
    "lift at 1/3 of pruning": {"schedule": ScheduleConfig(lift_at=1 / 3)},
    "lift at the end of pruning": {"schedule": ScheduleConfig(lift_at=1.0)},
    "pruning from the start": {"schedule": ScheduleConfig(start=0.0)},
    "pruning from 0.2": {"schedule": ScheduleConfig(start=0.2)},
    "pruning until 0.35": {"schedule": ScheduleConfig(end=0.35)},
    "pruning until 0.65": {"schedule": ScheduleConfig(end=0.65)},
    "pruning until 0.8": {"schedule": ScheduleConfig(end=0.8)},
    "linear schedule": {"schedule": ScheduleConfig(shape="linear")},
    "staircase schedule": {"schedule": ScheduleConfig(shape="staircase")},
    "masks every 25 steps": {"schedule": ScheduleConfig(update_every=25)},
    "masks every 100 steps": {"schedule": ScheduleConfig(update_every=100)},
    "regrowth of 0.1": {"regrow": 0.1},
    "regrowth of 0.3": {"regrow": 0.3},
    "decay of dense weights 0.05": {"weight_decay": 0.05},
    "decay of factors and values 0.05": {"factor_weight_decay": 0.05},
    "a budget for each layer": {"scope": "layer"},
}
"""Name to the settings that differ from the default method."""
