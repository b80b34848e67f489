"""What goes on beside a training's layers: their values, gradients and parameters over a lift, and inputs by name."""

from __future__ import annotations

import pytest
import torch
from tests.helpers import STEPS, attached, config, mlp, run, started, trained
from torch import Tensor, nn

from kronblocks import densify_, sparsify_
from kronblocks.nn.base import BlockLayer
from kronblocks.surgery import lift_


def test_fused_sgd_with_momentum_over_the_lift():
    weights = []
    for fused in (False, True):
        model = mlp()
        sparsifier = sparsify_(model, config(measure_plans=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=fused)
        sparsifier.attach(optimizer, total_steps=STEPS)
        run(model, sparsifier, optimizer)
        weights.append(model[2].weight.detach())
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


def test_a_lift_by_hand_is_followed():
    model = mlp()
    sparsifier, optimizer = started(model, config("kron-l1"))
    run(model, sparsifier, optimizer, until=5)
    lift_(model, optimizer)
    run(model, sparsifier, optimizer)
    weights = torch.cat([(layer.dense_weight() == 0).flatten() for layer in model if isinstance(layer, BlockLayer)])
    assert sparsifier.sparsity == float(weights.float().mean()) >= 0.75
    densify_(model)
    assert sparsifier.sparsity == float(weights.float().mean())


def test_parameters_that_were_replaced_have_no_gradient():
    model = mlp()
    sparsifier, optimizer = started(model, config())
    before = list(model.parameters())
    run(model, sparsifier, optimizer)
    now = {id(p) for p in model.parameters()}
    assert [p.grad is None for p in before] == [id(p) not in now for p in before]


def test_nothing_is_replaced_where_no_slot_is_given_up():
    model = mlp()
    sparsifier = sparsify_(model, config("static"))
    before = [id(p) for p in model.parameters()]
    optimizer = attached(model, sparsifier)
    run(model, sparsifier, optimizer)
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize("method", ["two-phase", "rigl", "magnitude"])
def test_layers_take_their_input_by_name(method):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(input=x)
            return x

    settings = config(method, regrow=0.2) if method != "rigl" else config(method)
    assert trained(Named(), settings).sparsity >= 0.75
