"""What a step has to do, and what a machine would allow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear
from kronblocks_lab.bench.cases.work import Work, count_work
from kronblocks_lab.bench.page.tables import roof, step_tables

MACHINE = {"product_gflops": 100.0, "copy_mib": [1, 64], "copy_gb_per_s": [20.0, 10.0]}


def test_a_dense_layer():
    model, x = nn.Sequential(nn.Linear(30, 20), nn.ReLU()), torch.randn(7, 30)
    parameters = 4 * (20 * 30 + 20)
    forward = count_work(model, lambda: model(x), 4, training=False)
    assert forward == Work(2 * 7 * 20 * 30, 4 * 7 * 50 + parameters)
    step = count_work(model, lambda: torch.autograd.grad(model(x).sum(), list(model.parameters())), 4, training=True)
    assert step == Work(2 * forward.flops, 2 * 4 * 7 * 50 + 10 * parameters)


def test_dead_blocks_ask_for_nothing():
    mask = torch.tensor([[True, False], [False, False]])
    model, x = BlockSparseLinear(32, 32, 16, mask=mask), torch.randn(7, 32)
    model.use_plan_("packed")
    assert count_work(model, lambda: model(x), 4, training=False).flops == 2 * 7 * 16 * 16


@pytest.mark.parametrize(("work", "bounds"), [(Work(10**9, 10**6), (2.0, 400.0)), (Work(10**8, 10**9), (20.0, 0.2))])
def test_bounds(work, bounds):
    """Against 20 ms of dense: products at the machine's rate, and copies at that of their size."""
    row = work.bounds(5.0, 20.0, MACHINE)
    assert (row["macs_bound"], row["bytes_bound"]) == bounds
    assert row["gflops"] == work.flops / 5e6
    assert roof(row) == f"{min(bounds):.2f}" and roof({"macs_bound": None}) == roof({}) == ""


def test_rows_that_were_counted_stand_beside_older_ones():
    row = {
        "rows": 2,
        "plan": None,
        "parameters": 1,
        "ms": 1.0,
        "speed": 1.0,
        "speed_low": 1.0,
        "speed_high": 1.0,
        "peak_bytes": None,
    }
    older, newer = {**row, "case": "dense"}, {**row, "case": "packed", "macs_bound": 3.0, "bytes_bound": 4.0}
    data = {"rows": [older, newer], "settings": {}}
    assert len({line.count("|") for line in step_tables(data) if line.startswith("|")}) == 1
