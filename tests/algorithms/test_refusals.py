"""What a sparsifier refuses, and what it says instead."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.helpers import METHODS, STEPS, Training, config, loss_of, mlp, run, started
from torch import nn

from kronblocks import KronblocksError, KronblocksWarning, SparsityConfig, parameter_groups, sparsify_
from kronblocks.config.methods import spec_of


def test_lbfgs_is_refused():
    training = Training(SparsityConfig(block_size=4))
    with pytest.raises(KronblocksError, match=r"LBFGS.*AdamW"):
        training.sparsifier.attach(torch.optim.LBFGS(training.model.parameters()), total_steps=10)


def test_an_optimiser_from_before_the_surgery_is_refused_by_layer_name():
    model = mlp(32, 24, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2))
    with pytest.raises(KronblocksError, match=r"parameters of 0, 2.*after sparsify_"):
        sparsifier.attach(optimizer, total_steps=10)


def test_attaching_twice_and_penalty_before_attach_are_refused():
    training = Training(SparsityConfig(block_size=4, rank=2))
    with pytest.raises(KronblocksError, match="attach"):
        training.sparsifier.penalty()
    training.start()
    with pytest.raises(KronblocksError, match="attached already"):
        training.sparsifier.attach(training.optimizer, total_steps=10)
    with pytest.raises(KronblocksError, match="optimiser or a list"):
        Training(SparsityConfig(block_size=4, rank=2)).sparsifier.attach([], total_steps=10)


def test_divergence_is_reported_where_it_is_noticed():
    training = Training(SparsityConfig(method="magnitude", block_size=4, target_sparsity=0.5)).start().run(3)
    with torch.no_grad():
        training.model[2].weight[0, 0] = float("inf")
    with pytest.raises(KronblocksError, match=r"layer '\d'.*diverged"):
        training.run(STEPS)


def test_states_that_do_not_fit_are_refused():
    state = Training(SparsityConfig(block_size=4, rank=2)).start().run(3).state()["sparsifier"]
    other = Training(SparsityConfig(method="group-lasso", block_size=4))
    with pytest.raises(KronblocksError, match="rule Magnitude"):
        other.sparsifier.load_state_dict(state)
    fresh = Training(SparsityConfig(block_size=4, rank=2))
    with pytest.raises(KronblocksError, match="version 7"):
        fresh.sparsifier.load_state_dict({**state, "version": 7})
    with pytest.raises(KronblocksError, match="no state of a Sparsifier"):
        fresh.sparsifier.load_state_dict({"hello": 1})
    fresh.sparsifier.load_state_dict(state)
    with pytest.raises(KronblocksError, match="total_steps=40"):
        fresh.sparsifier.attach(torch.optim.AdamW(fresh.model.parameters()), total_steps=STEPS + 1)


def test_impossible_targets_are_refused_before_anything_changes():
    model = mlp(8, 8, 8)
    with pytest.raises(KronblocksError, match="without a live block"):
        sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.9))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("settings", "others", "says"),
    [
        ({"method": "rigl"}, {"method": "rigl", "storage": "dense"}, "a block layer of its own.*storage"),
        ({"method": "rigl", "storage": "dense"}, {"method": "rigl"}, "a plain nn.Linear with a mask.*storage"),
        ({"method": "two-phase"}, {"method": "magnitude"}, "a block layer of its own.*method"),
        ({"method": "magnitude"}, {"method": "magnitude", "block_size": 8}, r"mask of \(6, 8\).*same block size"),
    ],
)
def test_states_of_another_storage_method_or_block_size_are_refused_before_anything_changes(settings, others, says):
    state = Training(SparsityConfig(**{"block_size": 4, "target_sparsity": 0.5, **settings})).start().run(3).state()
    other = Training(SparsityConfig(**{"block_size": 4, "target_sparsity": 0.5, **others}))
    kinds = [type(module) for module in other.model]
    with pytest.raises(KronblocksError, match=says):
        other.sparsifier.load_state_dict(state["sparsifier"])
    assert [type(module) for module in other.model] == kinds


def test_optimisers_whose_steps_run_no_hooks_are_refused():
    class Around(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, inner.defaults

        def step(self, closure=None) -> Any:
            return self.inner.step(closure)

    training = Training(SparsityConfig(block_size=4))
    with pytest.raises(KronblocksError, match=r"Around run no hooks.*super\(\).__init__"):
        training.sparsifier.attach(Around(torch.optim.SGD(training.model.parameters(), lr=0.1)), total_steps=10)


@pytest.mark.parametrize("method", ["two-phase", "magnitude"])
def test_flattened_weights_are_refused(method):
    """As FullyShardedDataParallel leaves them, with or without use_orig_params."""
    training = Training(SparsityConfig(method=method, block_size=4))
    layer = training.sparsifier.targets[1].module
    name = "weight" if method == "magnitude" else "coeff"
    flat = getattr(layer, name).detach().flatten()
    delattr(layer, name)
    for there in (nn.Parameter(flat), flat):
        setattr(layer, name, there)
        with pytest.raises(KronblocksError, match=r"weights of 2 have been flattened.*fully_shard"):
            training.sparsifier.attach(torch.optim.SGD(training.model.parameters(), lr=0.1), total_steps=10)
        delattr(layer, name)


def test_a_second_sparsifier_on_the_same_layers_is_refused():
    model = mlp()
    first = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    second = sparsify_(model, config())
    handle = first.attach(optimizer, total_steps=STEPS)
    other = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    for own in (optimizer, other):
        with pytest.raises(KronblocksError, match=r"another sparsifier, which is attached, follows 0, 2, 4: .*remove\(\)"):
            second.attach(own, total_steps=STEPS)
    layers = list(model)
    for method in ("two-phase", "rigl", "magnitude"):
        with pytest.raises(KronblocksError, match="another sparsifier, which is attached, follows 0, 2, 4"):
            sparsify_(model, config(method))
    assert all(now is before for now, before in zip(model, layers, strict=True))
    handle.remove()
    second.attach(optimizer, total_steps=STEPS)


@pytest.mark.parametrize("how", ["finished", "forgotten", "other layers"])
def test_a_second_sparsifier_may_follow_where_the_first_is_over_or_follows_others(how):
    model = mlp()
    layers = ("0",) if how == "other layers" else ("*",)

    def first_training() -> torch.optim.Optimizer | None:
        first, optimizer = started(model, config(layers=layers))
        run(model, first, optimizer, until=STEPS if how == "finished" else 2)
        return None if how == "forgotten" else optimizer  # forgotten: as by a cell of a notebook that is run again

    optimizer = first_training()
    later = {"other layers": ("2", "4")}.get(how, ("*",))
    second = sparsify_(model, SparsityConfig("magnitude", 8, target_sparsity=0.8, layers=later))
    own = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    second.attach(optimizer if how == "other layers" and optimizer else own, total_steps=STEPS)


@pytest.mark.parametrize("method", [method for method in METHODS if spec_of(method).defaults.form == "gradient"])
def test_a_penalty_that_is_left_out_is_warned_of(method):
    for called in (False, True):
        model = mlp()
        sparsifier, optimizer = started(model, config(method))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", KronblocksWarning)
            for step in range(3):
                loss = loss_of(model, step) + (sparsifier.penalty() if called else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert ["penalty() was not called" in str(each.message) for each in said] == [True] * (not called)


@pytest.mark.parametrize("ddp", ["model", 3])
def test_what_is_no_wrapper_is_refused(ddp):
    model = mlp(16, 16)
    with pytest.raises(KronblocksError, match=r"ddp=DistributedDataParallel\(model\)"):
        sparsify_(model, config()).attach(torch.optim.AdamW(model.parameters()), total_steps=STEPS, ddp=ddp)
