"""Optimisers that do not keep up with a training are noticed, whatever they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, loss_of, made, run

from kronblocks import KronblocksWarning


class Copies(torch.optim.Optimizer):
    """Steps a list of its own, as sharded and flattened optimisers do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.own = [p for group in self.param_groups for p in group["params"] if p.dim() != 3]
        self.factors = {id(p): p.shape for group in self.param_groups for p in group["params"] if p.dim() == 3}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = (p for group in self.param_groups for p in group["params"] if self.factors.get(id(p)) == p.shape)
        for p in (p for p in (*self.own, *held) if p.grad is not None):
            p.sub_(p.grad, alpha=0.1)


def test_values_that_no_step_moves_are_warned_of_once():
    model, sparsifier = made()
    optimizer = Copies(model.parameters())
    sparsifier.attach(optimizer, total_steps=60)
    with pytest.warns(KronblocksWarning, match=r"values of 0, 2 have not changed in 10 steps.*method='magnitude'") as said:
        run(model, sparsifier, optimizer, until=60)
    assert len(said) == 1


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_no_warning_where_a_rate_or_a_gradient_is_zero(quiet):
    for lr, scale in ((0.0, 1.0), (0.1, 0.0)):
        model, sparsifier = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        sparsifier.attach(optimizer, total_steps=STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            (scale * loss_of(model, step)).backward()
            optimizer.step()


def test_an_optimiser_that_never_steps_is_named_and_one_without_blocks_is_not_waited_for(quiet):
    model, sparsifier = made()
    rest = torch.optim.SGD([model[0].bias], lr=0.1)
    first = torch.optim.SGD([model[0].coeff, model[0].tiles], lr=0.1)
    second = torch.optim.SGD([model[2].coeff, model[2].tiles, model[2].bias], lr=0.1)
    handle = sparsifier.attach([rest, first, second], total_steps=STEPS)
    loss_of(model, 0).backward()
    first.step()
    second.step()
    assert sparsifier.step == 1
    handle.remove()
    sparsifier.attach([rest, first, second], total_steps=STEPS)
    with pytest.warns(KronblocksWarning, match=r"waits at step 1: optimiser 2 of those that attach was given \(SGD\)"):
        for _ in range(100):
            first.step()
