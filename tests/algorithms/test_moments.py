"""What optimisers remember, of any form: over the lift, the end of dead slots, and where weights are kept twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, WAYS, free_layers, loss_of, made, run, zeros
from torch import Tensor, nn

from kronblocks import KronblocksError, parameter_groups
from kronblocks.algorithms.moments import without_rows
from kronblocks.core import PerformanceWarning
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.surgery.lift import compact_


class Odd(torch.optim.Optimizer):
    """SGD with a state of a form that is given."""

    def __init__(self, parameters: Any, form: Callable[[Tensor], Any]) -> None:
        self.form = form
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[p]
            if not state:
                state["odd"] = self.form(p)
            self.check(state["odd"], self.form(p))
            p.sub_(p.grad, alpha=0.05)

    def check(self, found: Any, fresh: Any) -> None:
        """State has the form that it would have if it were new."""
        if isinstance(found, Tensor):
            assert found.shape == fresh.shape
        elif isinstance(found, dict):
            for key in found:
                self.check(found[key], fresh[key])
        elif isinstance(found, list | tuple):
            for one, other in zip(found, fresh, strict=True):
                self.check(one, other)


FORMS: dict[str, tuple[Callable[[Tensor], Any], bool]] = {  # and whether it can be cut to the live blocks
    "rows and columns, as Adafactor": (lambda p: [p.mean(-1), p.mean(-2)] if p.dim() > 1 else [p.clone()], True),
    "rows and columns kept, in a dictionary": (lambda p: {"r": p.mean(-1, keepdim=True), "step": 1}, True),
    "one number a block": (lambda p: p.flatten(1).norm(dim=1) if p.dim() > 1 else p.clone(), True),
    "a list of moments": (lambda p: [torch.zeros_like(p) for _ in range(3)], True),
    "numbers, words and nothing": (lambda p: {"step": torch.tensor(3.0), "kind": "x", "none": None, "one": torch.ones(1)}, True),
    "a slice of the flattened parameter, as Prodigy": (lambda p: p.flatten()[::11].clone(), False),
    "preconditioners, as Shampoo and SOAP": (lambda p: [torch.eye(size) for size in p.shape], False),
    "quantised in blocks, as bitsandbytes": (
        lambda p: [p.to(torch.int8), torch.ones(256), torch.ones(p.numel() // 256 + 2)],
        False,
    ),
    "columns of the blocks side by side, as Adalite": (lambda p: p.flatten(1).mean(0) if p.dim() > 1 else p.clone(), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["two-phase", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_state_of_any_form_goes_through_lift_and_the_end_of_dead_slots(form, method):
    model, sparsifier = made(method, "4x2")
    optimizer = Odd(model.parameters(), FORMS[form][0])
    sparsifier.attach(optimizer, total_steps=STEPS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run(model, sparsifier, optimizer)
    whole = [layer.capacity == int(layer.block_mask.sum()) for layer in free_layers(model)]
    told = [str(each.message) for each in said if isinstance(each.message, PerformanceWarning)]
    if FORMS[form][1]:
        assert all(whole) and not told
    else:
        assert not all(whole) and len(told) == 1 and "Odd keeps 'odd'" in told[0] and "slots of dead blocks" in told[0]
    assert zeros(model) == sparsifier.sparsity == 0.75


def test_rows_of_the_slots_that_stay_are_kept():
    layer = BlockSparseLinear(16, 16, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(3, 16)).square().sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[layer.values].items()}
    mask = torch.rand(4, 4) < 0.5
    layer.set_block_mask_(mask)
    kept = mask.flatten().nonzero().squeeze(1)
    assert compact_(nn.Sequential(layer), ["0"], [optimizer])
    after = optimizer.state[layer.values]
    assert all(torch.equal(after[name], before[name][kept]) for name in ("exp_avg", "exp_avg_sq"))
    assert torch.equal(after["step"], before["step"])


@pytest.mark.parametrize("shape", [(8,), (8, 8), (8, 1)])
def test_a_first_size_that_could_be_anothers_is_not_cut(shape):
    """Eight slots of 8x8 blocks: nobody can tell which size is which."""
    values = nn.Parameter(torch.zeros(8, 8, 8))
    optimizer = torch.optim.SGD([values])
    optimizer.state[values]["odd"] = torch.zeros(shape)
    assert without_rows([optimizer], values) is not None
    optimizer.state[values]["odd"] = torch.zeros(8, 8, 8)
    assert without_rows([optimizer], values) is None


# Optimisers around others, and with two points


class Slow(torch.optim.Optimizer):
    """Lookahead: prepares parameters when they join it, and pulls them to slow weights that it keeps."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner
        super().__init__([{**group, "params": list(group["params"])} for group in inner.param_groups], {})
        self.param_groups, self.calls = inner.param_groups, 0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()
        self.calls += 1
        for p in (p for group in self.param_groups for p in group["params"] if self.calls % 3 == 0):
            p.lerp_(self.state[p]["slow"], 0.5)
            self.state[p]["slow"].copy_(p)

    @torch.no_grad()
    def load_slow(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.copy_(self.state[p]["slow"])


class TwoPoints(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al. 2024): gradients at y, steps of z, and the average x of z for evaluation."""

    def __init__(self, parameters: Any, decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": 0.1, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                z = state.setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / 0.9)
                z.sub_(p.grad + group["decay"] * p, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                p.copy_(z.lerp(x, 0.9))

    @torch.no_grad()
    def eval(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if "z" in self.state[p]):
            p.lerp_(self.state[p]["z"], 1 - 1 / 0.9)


@pytest.mark.parametrize("method", WAYS)
def test_an_optimiser_around_another_prepares_lifted_values_and_keeps_zeros(method):
    model, sparsifier = made(method)
    optimizer = Slow(torch.optim.AdamW(parameter_groups(model, lr=1e-2)))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        assert zeros(model) >= sparsifier.sparsity - 1e-6
    assert len(optimizer.param_groups) == 5
    optimizer.load_slow()
    assert zeros(model) >= 0.75 - 1e-6, "slow weights of dead blocks are zero too"


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("method", WAYS)
def test_weights_at_two_points_are_zero_at_both(method, decay):
    model, sparsifier = made(method)
    optimizer = TwoPoints(model.parameters(), decay)
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    optimizer.eval()
    assert zeros(model) >= 0.75 - 1e-6 and sparsifier.sparsity == pytest.approx(0.75, abs=0.02)


def test_a_wrapper_with_a_state_of_its_own_that_runs_no_hooks_is_refused():
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups, self.state, self.defaults = inner, inner.param_groups, {}, inner.defaults

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model, sparsifier = made()
    with pytest.raises(KronblocksError, match="Around run no hooks"):
        sparsifier.attach(Around(torch.optim.SGD(model.parameters(), lr=0.1)), total_steps=STEPS)
