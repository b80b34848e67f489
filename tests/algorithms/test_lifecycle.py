"""What becomes of a sparsifier beside its training: freed, copied, pickled, not attached, layers unfrozen."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from typing import Any

import pytest
import torch
from tests import helpers
from tests.helpers import METHODS, STEPS, factors, loss_of, mlp, same, trained
from torch import Tensor, nn

from kronblocks import KronblocksError, KronblocksWarning, PenaltyConfig, SparsityConfig, parameter_groups, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.methods import spec_of

STORAGES = [
    (method, storage)
    for method in METHODS
    for storage in (("dense", "packed") if "storage" in spec_of(method).settings else (None,))
]


def config(method: str, storage: str | None = None, **settings) -> SparsityConfig:
    return helpers.config(method, block_size=4, storage=storage, **factors(method), **settings)


class Net(nn.Module):
    """A model that holds its sparsifier, as a LightningModule or a skorch net does."""

    def __init__(self, settings: SparsityConfig) -> None:
        super().__init__()
        self.net = mlp(32, 24, 16, 8)
        self.sparsifier = sparsify_(self.net, settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def train(model: nn.Module, sparsifier: Sparsifier | None, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        loss = loss_of(model, step)
        if sparsifier is not None:
            loss = loss + sparsifier.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=1e-2))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "storage"), STORAGES)
@pytest.mark.parametrize("stop", [14, STEPS])  # 14: in the midst of pruning, where probes listen
def test_trainings_are_freed_with_their_last_reference(method, storage, stop):
    def trial() -> list[weakref.ref]:
        net = Net(config(method, storage))
        net.sparsifier.save_with_model()
        optimizer = adamw(net)
        known: list[Any] = [net, net.sparsifier, optimizer, *net.modules(), *net.parameters()]
        net.sparsifier.attach(optimizer, total_steps=STEPS, add_penalty=True)
        train(net, None, optimizer, 0, stop)
        known += [*net.modules(), *net.parameters(), *net.sparsifier.targets]
        return [weakref.ref(each) for each in known]

    left = trial()
    gc.collect()
    assert [type(each()).__name__ for each in left if each() is not None] == []


def test_weights_go_with_the_model_though_the_optimiser_stays():
    """The hook on a weight does not hold its layer."""
    model = mlp(32, 24)
    sparsifier = sparsify_(model, config("magnitude"))
    weight = model[0].weight
    sparsifier.attach(optimizer := torch.optim.SGD([weight], lr=0.1), total_steps=STEPS)
    left = weakref.ref(model[0])
    del model, sparsifier, optimizer
    gc.collect()
    assert left() is None
    weight.sum().backward()  # and the hook of a target that is gone does nothing
    assert weight.grad is not None and bool((weight.grad == 1).all())


def copies(things: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save(things, file)
    file.seek(0)
    return [copy.deepcopy(things), pickle.loads(pickle.dumps(things)), torch.load(file, weights_only=False)]  # noqa: S301


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "storage", "stop"),
    [*((*each, 14) for each in STORAGES), ("two-phase", None, 0), ("two-phase", None, 25), ("magnitude", "dense", 25)],
)
def test_copies_go_on_to_the_same_bits_once_they_are_attached(method, storage, stop):
    net = Net(config(method, storage))
    optimizer = adamw(net)
    handle = net.sparsifier.attach(optimizer, total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, stop)
    others = copies((net, optimizer, handle))
    train(net, net.sparsifier, optimizer, stop, STEPS)
    for again, its_optimizer, its_handle in others:
        assert again.sparsifier.step == stop and again.sparsifier.model is again.net
        with pytest.raises(KronblocksError, match="attach"):
            again.sparsifier.penalty()
        its_handle.remove()  # of a copy there is nothing to remove
        again.sparsifier.attach(its_optimizer, total_steps=STEPS)
        train(again, again.sparsifier, its_optimizer, stop, STEPS)
        assert same(again.state_dict(), net.state_dict())
        assert again.sparsifier.report() == net.sparsifier.report()
        assert again.sparsifier.sparsity == 0.75
    assert net.sparsifier.step == STEPS


def test_a_sparsifier_is_pickled_before_any_training_too():
    """As ddp_spawn, Ray and joblib send models to other processes."""
    for method in METHODS:
        again = pickle.loads(pickle.dumps(Net(config(method))))  # noqa: S301
        again.sparsifier.attach(optimizer := adamw(again), total_steps=STEPS)
        train(again, again.sparsifier, optimizer, 0, STEPS)
        assert again.sparsifier.sparsity == 0.75


def test_a_copy_of_a_probe_does_not_listen():
    """Of a model that is copied in the step before blocks are exchanged."""
    net = Net(config("rigl"))
    net.sparsifier.attach(optimizer := adamw(net), total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, 2)
    while not net.sparsifier.measures_growth:
        train(net, net.sparsifier, optimizer, net.sparsifier.step, net.sparsifier.step + 1)
    again = copy.deepcopy(net)
    assert all(target._probe is None for target in again.sparsifier.targets)
    again(torch.randn(4, 32)).sum().backward()
    for module in again.modules():
        assert all(getattr(hook, "_run", None) is None for hook in module._forward_hooks.values())


@pytest.mark.parametrize(
    ("method", "removed", "says"),
    [
        ("two-phase", False, "nothing is pruned"),
        ("magnitude", False, "nothing is pruned"),
        ("rigl", False, "nothing is pruned"),
        ("static", False, ""),  # the layers keep their mask themselves, and there is nothing to decide
        ("two-phase", True, ""),
        ("magnitude", True, "Zeros of nn.Linear layers are lost"),
        ("rigl", True, ""),
    ],
)
def test_training_without_attach_is_noticed_once(method, removed, says):
    net = Net(config(method))
    optimizer = adamw(net)
    if removed:
        handle = net.sparsifier.attach(optimizer, total_steps=STEPS)
        train(net, net.sparsifier, optimizer, 0, STEPS)
        handle.remove()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", KronblocksWarning)
        train(net, None, optimizer, 0, 4)
    assert [says in str(each.message) for each in said] == [True] * bool(says)
    assert ("not attached" in str(net.sparsifier.report())) == bool(says)


def test_trainings_of_other_models_are_none_of_its_business():
    sparsifier = sparsify_(mlp(32, 8), config("magnitude"))
    other = mlp(32, 8)
    train(other, None, torch.optim.SGD(other.parameters(), lr=0.1), 0, 2)  # a warning would be an error
    assert "not attached" in str(sparsifier.report())
    sparsifier.attach(torch.optim.SGD(sparsifier.model.parameters(), lr=0.1), total_steps=STEPS)
    assert "not attached" not in str(sparsifier.report())


def test_a_copy_that_is_trained_without_attach_is_noticed():
    net = Net(config("group-lasso", penalty=PenaltyConfig(form="gradient")))
    optimizer = adamw(net)
    net.sparsifier.attach(optimizer, total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, 3)
    again, its_optimizer = copy.deepcopy((net, optimizer))
    with pytest.warns(KronblocksWarning, match=r"not attached, so nothing is pruned.*its copied sparsifier"):
        train(again, None, its_optimizer, 3, 5)


@pytest.mark.parametrize(("method", "storage"), STORAGES)
def test_layers_that_are_unfrozen_later_get_no_gradient_for_dead_blocks(method, storage):
    net = Net(config(method, storage))
    layer = net.net[0]
    layer.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    net.sparsifier.attach(optimizer, total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, 34)
    assert not any(p.requires_grad for p in net.net[0].parameters())
    net.net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net.net[0].parameters())})
    target = net.sparsifier.targets[0]
    mask = target.mask.clone()
    for step in range(34, STEPS):
        before = target.module.weight.detach().clone()
        optimizer.zero_grad()
        net(torch.randn(16, 32)).square().mean().backward()
        if isinstance(target.module, nn.Linear):
            gradient = target.module.weight.grad
            assert gradient is not None and bool((target.grid.norms(gradient)[~mask] == 0).all()), step
        optimizer.step()
        assert not torch.equal(target.module.weight, before)
    assert torch.equal(target.layer.nonzero_blocks(), mask) and not mask.all()


def test_frozen_again_and_unfrozen_again():
    net = Net(config("magnitude"))
    net.sparsifier.attach(optimizer := adamw(net), total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, 25)
    layer = net.net[2]
    assert isinstance(layer, nn.Linear)
    for frozen in (True, False):
        layer.requires_grad_(not frozen)
        layer.weight.grad = None
        net(torch.randn(4, 32)).sum().backward()
    assert layer.weight.grad is not None
    target = net.sparsifier.targets[1]
    assert (target.grid.norms(layer.weight.grad)[~target.mask] == 0).all()


STRANGER = r"AdamW steps 0, 2, 4, which a sparsifier follows through another optimiser.*in one list.*call remove\(\)"


def stranger_warnings(net: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", KronblocksWarning)
        train(net, None, optimizer, first, last)
    return [str(each.message) for each in said]


@pytest.mark.parametrize(("method", "storage"), STORAGES)
def test_an_optimiser_of_block_layers_that_nobody_attached_is_noticed_once(method, storage):
    net = Net(config(method, storage))
    optimizer = adamw(net)
    net.sparsifier.attach(optimizer, total_steps=STEPS)
    train(net, net.sparsifier, optimizer, 0, 3)
    if net.sparsifier.lift_to_come:
        other = adamw(net)
        for _ in range(2):  # at each of its steps: after the lift its state would be of other shapes
            with pytest.raises(KronblocksError, match=rf"{STRANGER}.*the lift is still to come"):
                train(net, None, other, 3, 4)
        return
    said = stranger_warnings(net, adamw(net), 3, 6)
    expected = [] if (method, storage) == ("static", "packed") else [STRANGER]  # whose layers keep a mask that stays
    assert len(said) == len(expected) and all(map(re.search, expected, said))
    train(net, net.sparsifier, optimizer, 3, 5)  # a warning would be an error


def test_optimisers_of_other_parameters_or_of_a_finished_training_are_not_warned_of():
    net = Net(config("rigl"))
    blocks = {id(p) for target in net.sparsifier.targets for p in target.parameters()}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if id(p) in blocks], lr=1e-2)
    others = torch.optim.AdamW([p for p in net.parameters() if id(p) not in blocks], lr=1e-2)
    net.sparsifier.attach(optimizer, total_steps=STEPS)
    assert not stranger_warnings(net, others, 0, 2)
    train(net, net.sparsifier, optimizer, 0, STEPS)
    assert not stranger_warnings(net, adamw(net), 0, 2)  # block layers keep their zeros themselves


def test_optimisers_that_step_others_are_not_warned_of():
    class Around(torch.optim.SGD):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__([p for group in inner.param_groups for p in group["params"]], lr=0.0)
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()
            return super().step(closure)

    for outer in (True, False):
        net = Net(config("magnitude"))
        around = Around(adamw(net))
        net.sparsifier.attach(around if outer else around.inner, total_steps=STEPS)
        assert not stranger_warnings(net, around, 0, 3) and net.sparsifier.step == 3


def test_a_model_that_carries_its_state_can_be_copied_and_pickled():
    model = mlp()
    sparsifier = trained(model, config("two-phase"), until=5)
    sparsifier.save_with_model()
    assert "kronblocks_state" in model.state_dict()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301
        assert "kronblocks_state" not in again.state_dict()
        assert torch.equal(again[0].dense_weight(), model[0].dense_weight())
