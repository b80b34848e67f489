"""The controller of a penalty: on a plant that pushes back, and in a training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import SparsityConfig, sparsify_
from kronblocks.sparsity.controller import PenaltyController


def test_a_plant_that_pushes_back_follows_its_schedule():
    """Plant: scores that live grow by a constant each step, against which the shrink has to win."""
    controller, scores = PenaltyController(), torch.linspace(0.5, 1.5, 200, dtype=torch.float64)
    rate, steps, updates = 0.01, 10, 30
    for update in range(updates):
        observed, wanted = float((scores == 0).double().mean()), 0.9 * update / updates
        assert observed == pytest.approx(wanted, abs=0.1)
        controller.update(wanted=wanted, observed=observed)
        penalty = controller.penalty(score=float(scores.quantile(0.9 * (update + 1) / updates)), rate=rate, steps=steps)
        for _ in range(steps):
            scores = torch.where(scores > 0, (scores + 0.001 - penalty * rate).clamp_min(0), scores)


@pytest.mark.parametrize("method", ["group-lasso", "elastic-group-lasso"])
def test_a_training_follows_the_schedule_of_its_sparsity(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    teacher = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).requires_grad_(False)
    sparsifier = sparsify_(model, SparsityConfig(method=method, block_size=4, target_sparsity=0.8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier.attach(optimizer, total_steps=600)
    seen = []
    for _ in range(600):
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), teacher(x)).backward()
        optimizer.step()
        schedule, report = sparsifier.schedule, sparsifier.report()
        assert schedule is not None
        if schedule.is_update(sparsifier.step):
            seen.append((schedule.sparsity_at(sparsifier.step), report.block_sparsity))
    assert len(seen) > 9 and seen[-1][1] == pytest.approx(0.8, abs=0.01)
    assert max(abs(wanted - observed) for wanted, observed in seen) < 0.25, seen  # while the loss pushes back
    assert max(abs(wanted - observed) for wanted, observed in seen[len(seen) // 2 :]) < 0.1, seen
