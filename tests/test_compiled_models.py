"""torch.compile around a model, a layer or the optimiser's step, and the steps of regrowth, which compiled code would hide."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from tests.test_unusual_scripts import STEPS, config, mlp, started, step
from torch.nn.functional import linear

from kronblocks import KronblocksError, ScheduleConfig, sparsify_
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.sparsity import growth


@pytest.mark.parametrize("settings", [config("rigl"), config("rigl", storage="dense"), config(regrow=0.3)])
def test_regrowth_in_a_compiled_model(settings):
    masks = []
    for compiled in (False, True):
        model = mlp()
        sparsifier, optimizer = started(model, settings)
        called = torch.compile(model, backend="eager") if compiled else model
        for _ in range(STEPS):
            step(called, sparsifier, optimizer)
        masks.append([target.mask.clone() for target in sparsifier.targets])
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
    assert sparsifier.sparsity >= 0.75


def test_a_layer_that_was_compiled_by_itself_is_followed():
    """torch.compile keeps the call of the layer that it was given, whatever stands in its place later."""
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    sparsifier, optimizer = started(model, config())
    for _ in range(STEPS):
        step(model, sparsifier, optimizer)
    layer, x = model.get_submodule("0._orig_mod"), torch.randn(4, 32)
    assert isinstance(layer, BlockSparseLinear) and layer.values.grad is not None
    torch.testing.assert_close(model[0](x), linear(x, layer.weight, layer.bias))
    assert sparsifier.sparsity >= 0.75


@pytest.fixture
def own_stance(monkeypatch):
    """The stance of torch.compile as a new process has it, whatever sparsifiers of other tests have not been collected yet."""
    gc.collect()
    monkeypatch.setattr(growth, "_STANCE", growth._Stance())
    with torch.compiler.set_stance("default"):
        yield


def test_compiled_code_is_compiled_again_after_regrowth_however_it_ends(own_stance):
    compiled: list[int] = []

    def is_compiling() -> bool:
        before = len(compiled)
        torch.compiler.reset()
        torch.compile(lambda x: x * 2, backend=lambda graph, _: compiled.append(1) or graph)(torch.ones(3))
        return len(compiled) > before

    trainings = [(model := mlp(), *started(model, config("rigl", schedule=ScheduleConfig(update_every=2)))) for _ in range(2)]
    for _ in range(STEPS):  # in turns, as in a search
        for training in trainings:
            step(*training)
    assert is_compiling()
    model, sparsifier, optimizer = trainings[0][0], *started(mlp(), config("rigl"))
    with torch.no_grad():
        next(sparsifier.model.parameters()).fill_(torch.nan)
    with pytest.raises(KronblocksError, match="diverged"):
        for _ in range(STEPS):
            step(sparsifier.model, sparsifier, optimizer)
    assert is_compiling()
    stopped = (model := mlp(), *started(model, config("rigl", schedule=ScheduleConfig(update_every=2))))
    step(*stopped)
    assert stopped[1].measures_growth and not is_compiling()
    copy.deepcopy(stopped[1])
    del stopped, model
    gc.collect()
    assert is_compiling()


def test_a_compiled_step_of_the_optimiser_with_regrowth():
    model = mlp()
    sparsifier, optimizer = started(model, config("rigl"))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(16, 32)).square().mean().backward()
        compiled()
    assert sparsifier.sparsity >= 0.75


def test_growth_of_one_example_without_a_batch_and_no_hooks_after_the_end():
    model = mlp()
    sparsifier = sparsify_(model, config("rigl", schedule=ScheduleConfig(update_every=1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS // 2):
        optimizer.zero_grad()
        model(torch.randn(32)).square().mean().backward()
        optimizer.step()
    assert sparsifier.measures_growth and all(layer._forward_hooks for layer in (model[0], model[2], model[4]))
    handle.remove()
    assert not any(layer._forward_hooks for layer in (model[0], model[2], model[4]))
