"""`kronblocks bench ops`: forward and forward + backward of one layer in every plan, against dense and other libraries."""

from __future__ import annotations

import torch
from rich.console import Console

from kronblocks.nn.base import BlockLayer
from kronblocks_lab.bench.cases import peers
from kronblocks_lab.bench.cases.choices import choose_again
from kronblocks_lab.bench.cases.grid import Auto, Ways, run_grid
from kronblocks_lab.bench.cases.grids import DENSITIES, Group, OpsSettings
from kronblocks_lab.bench.cases.ways import (
    BOTH,
    FASTKRON,
    FORWARD,
    authors_cases,
    auto_plan_,
    compiled_case,
    dense_case,
    factors_layer,
    factors_name,
    fastkron_cases,
    layer_case,
    peer_cases,
    plans_of,
    random_mask,
    values_layer,
)
from kronblocks_lab.bench.measure.results import Results, Row

FACTOR_DENSITIES = (0.1, 0.25, 1.0)  # of those of the whole grid; free values are timed at all of them
PEER_DENSITY = 0.25  # other libraries' products come nowhere near dense above this density
PEER_MACS = 1e9  # and are timed up to this many multiply-adds, since the slowest take seconds from here on
TRAINING_ROWS = 16  # from here on backward is timed too


def add_layer(ways: Ways, name: str, layer: BlockLayer, rows: int) -> None:
    """A layer in each fixed plan, and what "auto" makes of it."""
    ways.cases += [layer_case(name, layer, plan, rows) for plan in plans_of(layer)]
    for direction in (FORWARD, BOTH):
        plan = auto_plan_(layer, rows, training=direction == BOTH)
        if all(case.name != f"{name} {plan}" for case in ways.cases):
            ways.cases.append(layer_case(name, layer, plan, rows))
        ways.autos.append(Auto(f"{name} auto", direction, f"{name} {plan}"))


def ways(group: Group, settings: OpsSettings) -> Ways:
    """Everything that is timed in a group."""
    grid, rows, place = group.grid, group.rows, (settings.device, settings.torch_dtype)
    mask = random_mask(grid, group.density, torch.Generator().manual_seed(0))
    found = Ways([dense_case(grid, rows, *place)])
    if group.second_pass:
        found.add_peers(fastkron_cases(factors_layer(grid, mask, 1, False, *place), rows))
        return found
    values = values_layer(grid, mask, *place)
    add_layer(found, "values", values, rows)
    slow = settings.device == "cpu" and rows * grid.weights * group.density > PEER_MACS
    if group.density <= PEER_DENSITY and not slow:
        found.add_peers(peer_cases(values, rows))
    authors = []
    if group.density in FACTOR_DENSITIES or group.density not in DENSITIES:
        for rank, per_row in [*((rank, False) for rank in settings.all_ranks), (max(settings.all_ranks), True)]:
            layer = factors_layer(grid, mask, rank, per_row, *place)
            add_layer(found, factors_name(rank, per_row), layer, rows)
            if group.density == 1 and not per_row:
                authors += authors_cases(layer, rows)
    found.cases += authors
    if settings.compiled:
        found.cases += [compiled_case(case) for case in (found.cases[0], *authors)]
    return found


def show(console: Console, group: Group, rows: list[Row]) -> None:
    """One line for each direction of a finished group: free values, and the fastest of all others."""
    for direction in (FORWARD, BOTH):
        own = [row for row in rows if row["direction"] == direction and row["case"] != "dense"]
        if not own:
            continue
        best = max(own, key=lambda row: row["speed"])
        packed = next((f"packed {row['speed']:.2f}x, " for row in own if row["case"] == "values packed"), "")
        line = f"{group}, {direction}: {packed}best {best['case']} {best['speed']:.2f}x of dense"
        console.print(line, highlight=False, soft_wrap=True)


def run(settings: OpsSettings) -> Results:
    """Measure what is missing, and write it."""
    if settings.choices:
        return choose_again(settings, lambda group: ways(group, settings))
    results = run_grid(settings, lambda group: ways(group, settings), training_rows=TRAINING_ROWS, show=show)
    if peers.has_fastkron():
        results.head["skipped"].pop(FASTKRON, None)
    else:
        results.head["skipped"][FASTKRON] = "it is not installed"
    results.save()
    return results
