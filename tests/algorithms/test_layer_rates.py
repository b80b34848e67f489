"""Sparse layers step at multiples of the dense rate, and nobody but the step sees it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import helpers
from tests.helpers import Training, attached, loss_of, mlp
from torch import nn
from torch.optim import Optimizer

from kronblocks import BlockSparseLinear, KronblocksError, KronblocksWarning, SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.rates import kind_of
from kronblocks.algorithms.training.rate_parts import MOST_PARTS, RATES, Parts
from kronblocks.algorithms.training.stand_in import StandIn

STATIC = SparsityConfig(method="static", block_size=4, target_sparsity=0.75, distribution="uniform")


def static(optimizer: Any = torch.optim.SGD, lr: float = 0.25, config: SparsityConfig = STATIC, **settings: Any):
    torch.manual_seed(0)
    model = mlp(32, 32, 16)
    sparsifier = sparsify_(model, config)
    made = optimizer(parameter_groups(model, lr=lr, **settings))
    sparsifier.attach(made, total_steps=20)
    return model, sparsifier, made


def step(model: nn.Module, optimizer: Optimizer, number: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def moved(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What a step changes, relative to a gradient step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer)
    return {name: (p.detach() - before[name]) / -p.grad for name, p in model.named_parameters()}  # pyright: ignore[reportOptionalOperand]


def test_live_values_step_at_the_rate_over_the_density_and_biases_at_the_rate():
    model, sparsifier, optimizer = static()
    rates = {name: float(change.nanmedian()) for name, change in moved(model, optimizer).items()}
    assert rates == {name: pytest.approx(1.0 if "values" in name else 0.25, rel=1e-4) for name in rates}
    assert sparsifier.learning_rates() == {"0.values": pytest.approx(1.0), "2.values": pytest.approx(1.0)}


def test_plain_rates_and_groups_of_the_users_own_are_left_alone():
    for rates in ("plain", None):
        torch.manual_seed(0)
        model = mlp(32, 32, 16)
        sparsifier = sparsify_(model, STATIC)
        groups = model.parameters() if rates is None else parameter_groups(model, lr=0.25, rates=rates)
        optimizer = torch.optim.SGD(groups, lr=0.25)
        sparsifier.attach(optimizer, total_steps=20)
        assert all(float(change.nanmedian()) == pytest.approx(0.25, rel=1e-4) for change in moved(model, optimizer).values())


def test_a_group_of_the_users_own_may_ask_for_rates():
    torch.manual_seed(0)
    model = mlp(32, 32, 16)
    sparsifier = sparsify_(model, STATIC)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "rates": "auto"}], lr=0.25)
    sparsifier.attach(optimizer, total_steps=20)
    assert set(sparsifier.learning_rates().values()) == {1.0}
    other = sparsify_(again := mlp(), STATIC)
    optimizer = torch.optim.SGD([{"params": list(again.parameters()), "rates": "fast"}], lr=0.25)
    with pytest.raises(KronblocksError, match="'fast' is unknown: write one of 'auto'"):
        other.attach(optimizer, total_steps=20)
    optimizer.param_groups[0]["rates"] = "sgd"
    other.attach(optimizer, total_steps=20)  # it was not attached


def test_users_groups_are_what_they_were_in_the_step_too():
    """In closures, hooks and states that are saved inside, and after an error in the step."""
    model, _, optimizer = static(torch.optim.AdamW, weight_decay=0.1)
    groups, before = list(optimizer.param_groups), copy.deepcopy(optimizer.state_dict()["param_groups"])
    seen: list[Any] = []

    class Fails(RuntimeError): ...

    def closure() -> torch.Tensor:
        seen.append(optimizer.state_dict()["param_groups"])
        raise Fails

    with pytest.raises(Fails):
        optimizer.step(closure)
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.state_dict()["param_groups"]))
    step(model, optimizer)
    assert seen == [before, before]
    assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))


def test_decay_acts_as_in_the_dense_layer():
    """AdamW subtracts rate x decay x weight, and the product stays."""
    model, _, optimizer = static(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    layer = model[0]  # pyright: ignore[reportIndexIssue]
    before = layer.values.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(layer.values.detach(), before * (1 - 0.01 * 0.5))


def test_the_rate_follows_the_density_while_blocks_die():
    training = Training(helpers.config("magnitude", storage="packed", block_size=4)).start()
    seen = []
    for until in range(helpers.STEPS + 1):
        training.run(until)
        rates, lr = training.sparsifier.learning_rates(), training.optimizer.param_groups[0]["lr"]
        for target in training.sparsifier.targets:
            assert rates[f"{target.name}.values"] == pytest.approx(lr / target.layer.density)  # pyright: ignore[reportAttributeAccessIssue]
        seen.append(round(min(target.layer.density for target in training.sparsifier.targets), 6))  # pyright: ignore[reportAttributeAccessIssue]
    assert seen[0] == 1.0 and len(set(seen)) > 3


def test_rates_are_rounded_where_a_group_would_have_too_many_parts():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(200)]
    factors = {id(p): 1 + place / 10 for place, p in enumerate(parameters)}
    group = {"params": parameters, "lr": 1.0, RATES: "auto"}
    few = {**group, "params": parameters[:MOST_PARTS]}
    assert {id(p): part["lr"] for part in Parts([few], factors).begin() for p in part["params"]} == {
        id(p): factors[id(p)] for p in parameters[:MOST_PARTS]
    }
    parts = Parts([group], factors).begin()
    assert 10 < len(parts) <= MOST_PARTS
    assert {id(p): part["lr"] for part in parts for p in part["params"]} == pytest.approx(factors, rel=2**0.125 - 1)


def test_an_optimiser_of_several_sparsifiers_and_one_that_writes_into_its_groups():
    class Writes(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0, "k": 0, "lr_max": 0.0, "weight_sum": 0.0, "weight_lr_power": 2})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["lr_max"] = lr = max(group["lr"], group["lr_max"])
                group["weight_sum"] += lr**2
                group["k"] += 1
                group["new"] = "here"
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad, alpha=group["lr"])

    torch.manual_seed(0)
    models = [mlp(32, 32, 16) for _ in range(2)]
    sparsifiers = [sparsify_(model, STATIC) for model in models]
    optimizer = Writes([group for model in models for group in parameter_groups(model, lr=0.25)])
    for sparsifier in sparsifiers:
        sparsifier.attach(optimizer, total_steps=20)
    before = [model[0].values.detach().clone() for model in models]
    for number in range(2):
        optimizer.zero_grad()
        sum(loss_of(model, number) for model in models).backward()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        if number == 0:
            for model, values in zip(models, before, strict=True):
                torch.testing.assert_close(model[0].values.detach(), values - model[0].values.grad)
    assert {(g["k"], g["lr"], g["lr_max"], g["new"]) for g in optimizer.param_groups} == {(2, 0.25, 0.25, "here")}
    assert [g["weight_sum"] for g in optimizer.param_groups] == pytest.approx([0.125] * 10)
    assert [sparsifier.step for sparsifier in sparsifiers] == [2, 2]


@pytest.mark.parametrize(
    ("bases", "name", "defaults", "kind"),
    [
        ((torch.optim.AdamW,), "Mine", {}, "adam"),
        ((torch.optim.SGD,), "Mine", {}, "sgd"),
        ((torch.optim.Adafactor,), "Mine", {}, "plain"),
        ((torch.optim.Muon,), "Muon", {}, "plain"),
        ((Optimizer,), "FusedLamb", {"betas": (0.9, 0.99)}, "plain"),
        ((Optimizer,), "PagedLion8bit", {"betas": (0.9, 0.99)}, "adam"),
        ((Optimizer,), "SGD8bit", {"eps": 1e-8}, "sgd"),
        ((Optimizer,), "SignSGD", {"momentum": 0.9}, "adam"),
        ((Optimizer,), "Adafactor", {"scale_parameter": False}, "adam"),
        ((Optimizer,), "Prodigy", {"betas": (0.9, 0.99)}, "plain"),
        ((Optimizer,), "Whatever", {"betas": (0.9, 0.99)}, "adam"),
        ((Optimizer,), "Whatever", {"momentum": 0.9}, "sgd"),
    ],
)
def test_the_kind_of_an_optimiser(bases, name, defaults, kind):
    made = type(name, bases, {"step": lambda self, closure=None: None})
    matrix = [nn.Parameter(torch.zeros(2, 2))]
    assert kind_of(made(matrix, defaults) if bases == (Optimizer,) else made(matrix)) == kind


def test_a_wrapped_optimiser_is_the_one_that_counts():
    class Around(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            self.inner = inner
            super().__init__([p for group in inner.param_groups for p in group["params"]], {})

        def step(self, closure: Any = None) -> Any:
            self.inner.step()

    torch.manual_seed(0)
    model = mlp(32, 32, 16)
    sparsifier = sparsify_(model, STATIC)
    optimizer = Around(torch.optim.SGD(parameter_groups(model, lr=0.25)))
    sparsifier.attach(optimizer, total_steps=20)
    assert kind_of(optimizer) == "sgd"
    rates = {name: float(change.nanmedian()) for name, change in moved(model, optimizer).items()}
    assert rates == {name: pytest.approx(1.0 if "values" in name else 0.25, rel=1e-4) for name in rates}
    assert sparsifier.step == 1


def test_a_step_of_a_base_class_inside_and_attributes_that_a_step_writes():
    class Inside(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            assert isinstance(self, StandIn) and type(self).__name__ == "Inside"
            return super().step()

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on torch runs hooks in the base class's steps, too
    model, sparsifier, optimizer = static(Inside)
    rates = {name: float(change.nanmedian()) for name, change in moved(model, optimizer).items()}
    assert rates["0.values"] == pytest.approx(1.0, rel=1e-4)
    assert (optimizer.calls, sparsifier.step) == (1, 1)


def test_a_hook_that_puts_the_optimiser_back_is_told():
    model, _, optimizer = static()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, *args[1:]), kwargs))
    with pytest.warns(KronblocksWarning, match=r"return \(args\[0\], ...\)"):
        step(model, optimizer)
    step(model, optimizer, 1)  # once


@pytest.mark.parametrize("settings", [{"foreach": True}, {"fused": True}, {"capturable": False, "lr": "tensor"}])
def test_variants_of_adam_step_alike(settings):
    values = []
    for more in ({}, settings):
        model, _, optimizer = static(torch.optim.Adam, lr=0.01)
        for group in optimizer.param_groups:
            group.update({**more, "lr": torch.tensor(0.01)} if "lr" in more else more)
        for number in range(3):
            step(model, optimizer, number)
        assert all(float(group["lr"]) == pytest.approx(0.01) for group in optimizer.param_groups)
        values.append(model[0].values.detach())
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("method", ["two-phase", "rigl"])
def test_a_resumed_training_has_the_same_rates_to_the_bit(method):
    settings = helpers.config(method, block_size=4, **helpers.factors(method))
    whole = Training(settings).start().run(helpers.STEPS)
    first = Training(settings).start().run(9)
    again = Training(settings).start(copy.deepcopy(first.state()))
    assert again.sparsifier.learning_rates() == first.sparsifier.learning_rates()
    again.run(helpers.STEPS)
    assert helpers.same(whole.state(), again.state())


def test_states_of_before_have_no_rates_and_go_on_plainly():
    settings = helpers.config(block_size=4, rank=2)
    first = Training(settings).start().run(9)
    state = copy.deepcopy(first.state())
    del state["sparsifier"]["rates"]
    for group in state["optimizer"]["param_groups"]:
        del group["rates"]
    again = Training(settings).start(state)
    lr = again.optimizer.param_groups[0]["lr"]
    assert set(again.sparsifier.learning_rates().values()) == {lr}
    again.run(helpers.STEPS)
    assert again.sparsifier.sparsity == settings.target_sparsity


@pytest.mark.parametrize("rates", ["x", {"0": 1}, {"0": {"live": -1, "coeff": 0.0, "tiles": 0.0}}, {"0": {"live": "a"}}])
def test_damaged_rates_in_a_state_are_refused(rates):
    model = mlp()
    sparsifier = sparsify_(model, STATIC)
    attached(model, sparsifier)
    state = sparsifier.state_dict()
    with pytest.raises(KronblocksError, match="rates in the state are damaged"):
        sparsifier.load_state_dict({**state, "rates": rates})


def test_a_copied_training_is_scaled_as_well():
    model, sparsifier, optimizer = static()
    step(model, optimizer)
    again, other, follower = copy.deepcopy((model, optimizer, sparsifier))
    follower.attach(other, total_steps=20)
    step(model, optimizer, 1)
    step(again, other, 1)
    assert torch.equal(model[0].values, again[0].values)
    assert isinstance(again[0], BlockSparseLinear)
