"""What optimisers remember of factors goes over to the values that they become."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kronblocks import KroneckerBlockLinear, parameter_groups
from kronblocks.surgery import lift_


def trained(optimizer: Any, gate: bool = False, steps: int = 30, noise: float = 1.0, **settings: Any):
    """A layer whose weight gets gradients of independent normal entries."""
    torch.manual_seed(0)
    layer = KroneckerBlockLinear(64, 32, 8, rank=4, tile_groups=2, gate=gate)
    mask = torch.rand(4, 8) < 0.6
    layer.set_block_mask_(mask)
    model = nn.Sequential(layer)
    made = optimizer(parameter_groups(model, lr=0.0), **settings)
    for _ in range(steps):
        made.zero_grad()
        (layer.dense_weight() * torch.randn(32, 64) * noise).sum().backward()
        made.step()
    return model, mask, made


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "name", "wanted"),
    [
        (torch.optim.AdamW, "exp_avg_sq", 1 - 0.9**30),
        (torch.optim.RMSprop, "square_avg", 1 - 0.9**30),
        (torch.optim.Adagrad, "sum", 30),
    ],
)
def test_second_moments_are_those_of_the_weights_gradients(optimizer, name, wanted, gate):
    memory = {"betas": (0.9, 0.9)} if optimizer is torch.optim.AdamW else {"alpha": 0.9} if name == "square_avg" else {}
    model, mask, made = trained(optimizer, gate, noise=3.0, **memory)
    if gate:
        with torch.no_grad():
            model[0].gate.fill_(2.0)  # pyright: ignore[reportOptionalMemberAccess]
        made.state[model[0].coeff][name].mul_(4)  # as gradients with such gates would have made it
    lift_(model, made)
    state = made.state[model[0].values]
    assert state[name].shape == (int(mask.sum()), 8, 8) and int(state["step"]) == 30
    # the mean over 18 blocks of 4 squares each, averaged over about 19 steps, has a standard deviation of 4%
    assert float(state[name].mean()) == pytest.approx(9 * wanted, rel=0.15)
    assert not state.get("exp_avg", torch.zeros(1)).any()


def test_blocks_without_gradients_so_far_begin_as_the_others():
    model, mask, made = trained(torch.optim.Adam)
    p, q = mask.nonzero()[0].tolist()
    made.state[model[0].coeff]["exp_avg_sq"][p, q] = 0
    lift_(model, made)
    squares = made.state[model[0].values]["exp_avg_sq"][:, 0, 0]
    assert float(squares[0]) > 0.3 * float(squares[1:].mean())


def test_what_is_not_understood_begins_anew():
    class Odd(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            super().step()
            for group in self.param_groups:
                for p in (p for p in group["params"] if self.state[p]):
                    self.state[p]["z"] = p.detach().clone()

    for optimizer, settings in ((Odd, {}), (torch.optim.SGD, {"momentum": 0.9})):
        model, _, made = trained(optimizer, **settings)
        lift_(model, made)
        assert model[0].values not in made.state
        made.zero_grad()
        model(torch.randn(3, 64)).sum().backward()
        made.step()


def test_the_first_steps_after_the_lift_are_not_at_full_rate_in_a_random_direction():
    sizes = []
    for forget in (False, True):
        model, _, made = trained(torch.optim.Adam, betas=(0.9, 0.99))
        lift_(model, made)
        if forget:
            made.state.clear()
        for group in made.param_groups:
            group["lr"] = 1.0
        before = model[0].values.detach().clone()
        made.zero_grad()
        (model[0].dense_weight() * torch.randn(32, 64)).sum().backward()
        made.step()
        sizes.append(float((model[0].values.detach() - before).square().mean().sqrt()))
    assert sizes[1] == pytest.approx(1.0, rel=1e-3) and sizes[0] < 0.3  # a steady Adam: sqrt((1 - beta1) / (1 + beta1)) or less
