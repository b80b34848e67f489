"""Which group of which optimiser lifted values join: by the groups that held their factors, never by a name alone."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from tests import helpers
from tests.helpers import mlp, run
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from kronblocks import SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.surgery import lift_
from kronblocks.surgery.groups import PART

STEPS = 20  # the lift comes after step 6
RATES = {"backbone": 1e-3, "head": 1e-1}


def parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"backbone": nn.Linear(32, 32), "head": nn.Linear(32, 16)})


def config(**settings: Any) -> SparsityConfig:
    return helpers.config(**{"block_size": 4, "rank": 2, **settings})


def groups_of(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """The groups of each part, one call after the other; values have a rate of their own."""
    settings = {"lifted_lr_scale": 1.5, **settings}
    return [group for name, lr in RATES.items() for group in parameter_groups(model.get_submodule(name), lr=lr, **settings)]


def rates(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate of every layer's values."""
    rate = {id(p): group["lr"] for each in optimizers for group in each.param_groups for p in group["params"]}
    return {name: rate[id(module.values)] for name, module in model.named_modules() if isinstance(module, BlockSparseLinear)}


def train(model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        x = torch.randn(8, 32)
        loss = (model["head"](model["backbone"](x).tanh()) - x[:, :16]).square().mean()  # pyright: ignore[reportIndexIssue]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


WANTED = {"backbone": pytest.approx(1.5e-3), "head": pytest.approx(1.5e-1)}


def same(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return groups


def by_kind(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All groups of one name before those of the next, the parts in turns."""
    return [*itertools.chain.from_iterable(zip(groups[:5], groups[5:], strict=True))]


def by_rate(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(groups, key=lambda group: -group["lr"])


def lifted_first(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(groups, key=lambda group: group["name"] != "lifted")


@pytest.mark.parametrize("arrange", [same, reversed, by_kind, by_rate, lifted_first, copy.copy])
def test_values_join_the_group_of_their_own_part(arrange):
    model = parts()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(list(arrange(groups_of(model))))
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer)
    assert rates(model, optimizer) == WANTED


@pytest.mark.parametrize("late", [False, True])
def test_a_part_that_is_added_later_and_one_without_empty_groups(late):
    model = parts()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model["backbone"], lr=RATES["backbone"], lifted_lr_scale=1.5, keep_empty=late))
    for group in parameter_groups(model["head"], lr=RATES["head"], lifted_lr_scale=1.5, keep_empty=True):
        optimizer.add_param_group(group)
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer)
    # without a group of their own, values keep the rate of their factors
    assert rates(model, optimizer) == {**WANTED, "backbone": pytest.approx(1.5e-3 if late else 1e-3)}


def test_rates_that_a_scheduler_has_changed():
    model = parts()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(groups_of(model))
    LambdaLR(optimizer, [lambda _, k=k: 1.0 + k for k in range(10)])  # the groups "lifted" are numbers 4 and 9
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer)
    assert rates(model, optimizer) == {"backbone": pytest.approx(5 * 1.5e-3), "head": pytest.approx(10 * 1.5e-1)}


@pytest.mark.parametrize("old_version", [False, True])
@pytest.mark.parametrize("stop", [3, 12])  # before the lift, and after it
def test_resumed_in_place_as_by_accelerate(stop, old_version):
    """Attached first, then loaded: the optimiser gets the lifted values while its state is restored."""
    model = parts()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(groups_of(model))
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer, stop)
    saved = copy.deepcopy((sparsifier.state_dict(), model.state_dict(), optimizer.state_dict()))
    if old_version:
        for group in saved[2]["param_groups"]:
            del group[PART]
    again = parts()
    resumed = sparsify_(again, config())
    other = torch.optim.AdamW(groups_of(again))
    resumed.attach(other, total_steps=STEPS)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    train(again, resumed, other, STEPS - stop)
    assert rates(again, other) == WANTED
    assert resumed.sparsity == 0.75


def test_a_pickled_and_a_copied_optimiser_keep_their_parts():
    model = parts()
    sparsify_(model, config())
    optimizer = torch.optim.AdamW(by_rate(groups_of(model)))
    for pair in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):  # noqa: S301
        lift_(*pair)
        assert rates(*pair) == WANTED


def test_two_models_in_one_optimiser_and_two_optimisers_of_a_gan():
    generator, critic = parts(), parts()
    both = [(model, sparsify_(model, config())) for model in (generator, critic)]
    groups = [group for model, _ in both for group in groups_of(model)]
    optimizer = torch.optim.AdamW(groups)
    for _, sparsifier in both:
        sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for model in (generator, critic):
            model["head"](model["backbone"](torch.randn(4, 32))).square().mean().backward()
        optimizer.step()
    assert rates(generator, optimizer) == rates(critic, optimizer) == WANTED
    places = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    assert id(generator["head"].values) in places[9] and id(critic["head"].values) in places[19]


def test_saved_states_of_equal_trainings_are_equal():
    """However many calls of parameter_groups there were before in the process."""
    numbers = []
    for _ in range(2):
        model = parts()
        sparsifier = sparsify_(model, config())
        optimizer = torch.optim.AdamW(groups_of(model))
        sparsifier.attach(optimizer, total_steps=STEPS)
        numbers.append([group[PART] for group in optimizer.state_dict()["param_groups"]])
    assert numbers[0] == numbers[1] == [0] * 5 + [1] * 5


def test_groups_that_a_user_named_so_by_hand():
    model = parts()
    sparsifier = sparsify_(model, config())
    groups = []
    for name, lr in RATES.items():
        part = model.get_submodule(name)
        groups += [{"params": list(part.parameters()), "lr": lr, "name": name}, {"params": [], "lr": 2 * lr, "name": "lifted"}]
    optimizer = torch.optim.SGD(groups)
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer)
    assert rates(model, optimizer) == {"backbone": pytest.approx(2e-3), "head": pytest.approx(2e-1)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{"foreach": True}, {"maximize": True}, {"capturable": False, "differentiable": False}])
def test_options_of_optimisers_and_names_of_parameters(options, fused):
    if fused and "foreach" in options:
        options = {}
    model = parts()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3, fused=fused, **options)
    sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == {
        n: id(p) for n, p in model.named_parameters()
    }


def test_groups_of_a_part_split_by_layer_keep_to_their_layer():
    """Rates that decay by layer: each group of a call is cut up, and the pieces have one number."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    sparsifier = sparsify_(model, config())
    groups = []
    for layer, lr in zip(model, (1e-3, 1e-1), strict=True):
        own = {id(p) for p in layer.parameters()}
        for group in parameter_groups(model, lr=lr, lifted_lr_scale=1.5):
            groups.append({**group, "params": [p for p in group["params"] if id(p) in own], PART: 0})
    optimizer = torch.optim.SGD(groups)
    sparsifier.attach(optimizer, total_steps=STEPS)
    lift_(model, optimizer)
    assert rates(model, optimizer) == {"0": pytest.approx(1.5e-3), "1": pytest.approx(1.5e-1)}


def test_named_parameters_have_their_names_after_the_lift():
    model = mlp()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_values_join_one_optimiser_when_factors_were_in_two():
    model = mlp()
    sparsifier = sparsify_(model, config())
    coefficients = [p for name, p in model.named_parameters() if name.endswith("coeff")]
    others = [p for name, p in model.named_parameters() if not name.endswith("coeff")]
    optimizers = [torch.optim.SGD(coefficients, lr=1e-2), torch.optim.SGD(others, lr=1e-2)]
    sparsifier.attach(optimizers, total_steps=STEPS)
    run(model, sparsifier, *optimizers)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert sparsifier.sparsity >= 0.75
