"""Keep timings of this machine in the process, and in the user's cache folder (`core/cache.py`).

Damaged entries are measured again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping

import torch

from kronblocks.core import cache as kept
from kronblocks.ops.backends import backend_key
from kronblocks.ops.costs.timing import REFERENCE, as_measured, measure
from kronblocks.ops.plans import PLAN_NAMES
from kronblocks.ops.precision import float32_products
from kronblocks.ops.problem import Problem

Tables = dict[str, dict[str, float]]
"""What timings depend on, as JSON text -> plan -> seconds per step."""

_VERSION = 4
_memo: Tables = {}


def timings(problem: Problem, record: Tables | None = None) -> dict[str, float]:
    """Seconds per step of the plans worth timing and of `F.linear`, known or measured now.

    Only densities 1, 1/2, 1/4, ... are measured, so a training measures each shape a few times. Between two of them, time is
    assumed to be linear in the density. Above the most rows that are timed, it is assumed to be proportional to the rows.

    Args:
        problem: the layer's product.
        record: gets the tables that were used.
    """
    measured, least = as_measured(problem), 1 / problem.grid.blocks
    density = min(1.0, max(problem.density, least))
    denser = 2.0 ** -math.floor(-math.log2(density))
    sparser = max(denser / 2, least)
    share = (density - sparser) / (denser - sparser) if sparser < denser else 1.0

    def table(density: float) -> dict[str, float]:
        return _table(dataclasses.replace(measured, density=density, gate=False), record)

    if min(share, 1 - share) < 0.05:  # near one of the two: the other need not be measured
        times = dict(table(denser if share > 0.5 else sparser))
    else:
        many, few = table(denser), table(sparser)
        # timed at one density only, since it was far too slow at the other: an upper bound, proportional or constant
        times = {name: value * density / sparser for name, value in few.items()} | many
        times |= {name: share * many[name] + (1 - share) * few[name] for name in many if name in few}
    return {name: value * max(1, problem.rows) / measured.rows for name, value in times.items()}


def load_tables(tables: Mapping[str, object]) -> None:
    """Use the timings of an earlier run before those of the folder. Entries that are not timings are ignored."""
    for key, seconds in tables.items():
        checked = _checked(seconds)
        if checked is not None:
            _memo[key] = checked


def forget_timings() -> None:
    """Forget the timings of this process; the files stay."""
    _memo.clear()


def _table(problem: Problem, record: Tables | None) -> dict[str, float]:
    key = _key(problem)
    if key not in _memo:
        seconds = _read(key) or _measure(problem, key)
        if not seconds:
            return {}
        _memo[key] = seconds
    if record is not None:
        record[key] = _memo[key]
    return _memo[key]


def _measure(problem: Problem, key: str) -> dict[str, float]:
    seconds = measure(problem)
    other = _read(key)  # another process may have been first: use its timings
    if other is None and len(seconds) > 1:
        _write(key, seconds)
    return other or seconds


def _key(problem: Problem) -> str:
    """What timings depend on, as JSON text."""
    device = problem.device
    return json.dumps(
        {
            "machine": kept.processor() if device == "cpu" else _accelerator(device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads() if device == "cpu" else None,
            "torch": torch.__version__,
            "backend": backend_key(device, problem.dtype),
            "precision": None if device == "cpu" else float32_products(),
            "tuned": None if device == "cpu" else os.environ.get("KRONBLOCKS_TUNE") == "1",
            "shape": [problem.grid.out_features, problem.grid.in_features],
            "block": list(problem.grid.block),
            "rank": problem.rank,
            "tile_groups": problem.tile_groups,
            "rows": problem.rows,
            "density": problem.density,
            "dtype": str(problem.dtype),
            "device": device,
            "training": problem.training,
            "input_grad": problem.input_grad,
        }
        | ({} if problem.convolution is None else {"convolution": problem.convolution.numbers()}),
        sort_keys=True,
    )


def _accelerator(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()


def _read(key: str) -> dict[str, float] | None:
    content = kept.read("timings", _VERSION, key)
    return None if content is None else _checked(content.get("seconds"))


def _write(key: str, seconds: dict[str, float]) -> None:
    kept.write("timings", _VERSION, key, seconds=seconds)


def _checked(seconds: object) -> dict[str, float] | None:
    """The timings, if they are finite positive seconds of existing plans; else None."""
    if not isinstance(seconds, dict) or len(seconds) < 2 or not seconds.keys() <= {REFERENCE, *PLAN_NAMES}:
        return None
    if not all(isinstance(value, float) and 0 < value < 1e6 for value in seconds.values()):
        return None
    return dict(seconds)
