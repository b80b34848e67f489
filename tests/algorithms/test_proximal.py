"""The shrink that keeps to a schedule: against a loss that pushes back, whatever the learning rate does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from kronblocks import SparsityConfig, sparsify_
from kronblocks.config.sparsity import PenaltyConfig, ScheduleConfig
from kronblocks.ops import BlockSize
from kronblocks.surgery.sparsify import schedule_of


def seen_in_a_training(config: SparsityConfig, rate: Callable[[float], float] = lambda done: 1.0) -> list[tuple[int, float]]:
    """Sparsity after every step of a training, whose rate goes over the steps as a function of the share that is done."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).requires_grad_(False)
    sparsifier = sparsify_(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer, total_steps=STEPS)
    seen = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 3e-3 * rate(step / STEPS)
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), teacher(x)).backward()
        optimizer.step()
        seen.append((sparsifier.step, sparsifier.report().block_sparsity))
    return seen


STEPS = 160
LASSO = SparsityConfig(method="group-lasso", block_size=4, target_sparsity=0.8)
WARM_UP = {
    "constant rate": lambda done: 1.0,
    "long warm-up from 0, then to 0": lambda done: min(done / 0.3, (1 - done) / 0.7),
    "cosine": lambda done: 0.5 * (1 + torch.cos(torch.tensor(3.14159 * done)).item()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        LASSO,
        replace(LASSO, method="elastic-group-lasso"),
        replace(LASSO, scope="layer"),
        replace(LASSO, schedule=ScheduleConfig(shape="staircase")),
        replace(LASSO, method="kron-l1", penalty=PenaltyConfig(form="proximal")),
    ],
    ids=["plain", "elastic", "layer by layer", "in stages", "gates"],
)
@pytest.mark.parametrize("rate", WARM_UP.values(), ids=WARM_UP)
def test_a_training_keeps_to_the_schedule_of_its_sparsity(config, rate):
    schedule = schedule_of(config)(STEPS)
    for step, observed in seen_in_a_training(config, rate):
        # of 320 blocks; the next update is never overshot by more than the rounding up of one block a layer
        assert observed <= schedule.sparsity_at(schedule.next_update(step)) + 2 / 320, step
        if schedule.is_update(step):  # and what is due is dead, but for blocks that layers and the head's rows keep
            assert observed >= schedule.sparsity_at(step) - 6 / 320, step


def test_a_fixed_strength_shrinks_by_the_rate():
    fixed = replace(LASSO, penalty=PenaltyConfig(strength=1.0))
    warm, constant = (dict(seen_in_a_training(fixed, rate)) for rate in (lambda done: min(1.0, done / 0.45), lambda done: 1.0))
    assert sum(constant.values()) > sum(warm.values()) + 1
    assert constant[STEPS] == warm[STEPS] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("rates", [(1.0, 0.3, 0.1), (0.1, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_layers_of_unequal_rates_and_block_sizes_keep_to_the_schedule(rates, scope):
    """Of those that have a rate; the others stay as they are until the last cut."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 20))
    config = SparsityConfig(method="group-lasso", block_size=8, target_sparsity=0.75, on_mismatch="nearest", scope=scope)
    sparsifier = sparsify_(model, config)
    linears = [model[0], model[2], model[4]]
    optimizer = torch.optim.AdamW([{"params": m.parameters(), "lr": 3e-3 * r} for m, r in zip(linears, rates, strict=True)])
    sparsifier.attach(optimizer, total_steps=STEPS)
    schedule = sparsifier.schedule
    assert schedule is not None
    before, seen = [m.weight.detach().clone() for m in linears], []
    for step in range(1, schedule.end_step):
        optimizer.zero_grad()
        x = torch.randn(64, 64)
        (model(x) - x[:, :20]).square().mean().backward()
        optimizer.step()
        layers = sparsifier.report().layers
        moving = [layer for layer, rate in zip(layers, rates, strict=True) if rate > 0]
        areas = [BlockSize.parse(layer.block_size).area for layer in moving]
        weights = sum(layer.total_blocks * area for layer, area in zip(moving, areas, strict=True))
        dead = sum((layer.total_blocks - layer.live_blocks) * area for layer, area in zip(moving, areas, strict=True))
        three = 3 * max(areas) / weights  # blocks
        assert dead / weights <= schedule.sparsity_at(schedule.next_update(step)) + three, step
        if schedule.is_update(step):
            assert dead / weights >= schedule.sparsity_at(step) - three, step
            seen.append(step)
    assert len(seen) >= 9
    for linear, rate, start in zip(linears, rates, before, strict=True):
        assert rate > 0 or torch.equal(linear.weight, start)
