"""What a sparsifier refuses, and what it says instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.algorithms.small_training import STEPS, Training, mlp
from torch import nn

from kronblocks import KronblocksError, SparsityConfig, sparsify_


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
