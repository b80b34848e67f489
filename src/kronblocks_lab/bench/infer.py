"""`kronblocks bench infer`: one layer in inference, as a finished model would run it."""

from __future__ import annotations

import torch
from rich.console import Console

from kronblocks.ops.costs.choice import VALUES, choose_deployed
from kronblocks_lab.bench.cases.choices import choose_again
from kronblocks_lab.bench.cases.grid import Auto, Ways, run_grid
from kronblocks_lab.bench.cases.grids import Group, InferSettings
from kronblocks_lab.bench.cases.ways import (
    DENSE,
    FORWARD,
    dense_case,
    factors_layer,
    factors_name,
    layer_case,
    peer_cases,
    plans_of,
    random_mask,
    values_layer,
)
from kronblocks_lab.bench.measure.results import Results, Row
from kronblocks_lab.bench.ops import PEER_MACS


def ways(group: Group, settings: InferSettings) -> Ways:
    """Everything that is timed in a group. "auto" is the form to deploy: "dense" is an `nn.Linear`, "values" packed blocks."""
    grid, rows, place = group.grid, group.rows, (settings.device, settings.torch_dtype)
    mask = random_mask(grid, group.density, torch.Generator().manual_seed(0))
    found = Ways([dense_case(grid, rows, *place)])
    values, factors = values_layer(grid, mask, *place), factors_layer(grid, mask, settings.rank, True, *place)
    for name, layer in (("values", values), (factors_name(settings.rank, True), factors)):
        layer.eval()
        found.cases += [layer_case(name, layer, plan, rows) for plan in plans_of(layer) if plan != "dense"]
        form = choose_deployed(layer.problem(rows=rows)).form
        alias = {"dense": DENSE, VALUES: "values packed"}.get(form, f"{name} {form}")
        found.autos.append(Auto(f"{name} auto", FORWARD, alias))
    if settings.device != "cpu" or rows * grid.weights * group.density <= PEER_MACS:
        found.add_peers(peer_cases(values, rows))
    return found


def show(console: Console, group: Group, rows: list[Row]) -> None:
    """One line: every case's speed."""
    speeds = ", ".join(f"{row['case']} {row['speed']:.2f}x" for row in rows if row["case"] != DENSE)
    console.print(f"{group}: {speeds}", highlight=False, soft_wrap=True)


def run(settings: InferSettings) -> Results:
    """Measure what is missing, and write it."""
    if settings.choices:
        return choose_again(settings, lambda group: ways(group, settings))
    return run_grid(settings, lambda group: ways(group, settings), inference=True, show=show)
