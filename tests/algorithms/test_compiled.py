"""torch.compile around a model, a layer or the optimiser's step, and the steps of regrowth, which compiled code would hide."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, config, loss_of, mlp, run, started
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from kronblocks import KronblocksError, KronblocksWarning, ScheduleConfig, SparsityConfig, sparsify_
from kronblocks.algorithms import growth
from kronblocks.nn.block_sparse_linear import BlockSparseLinear

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("settings", [config("rigl"), config("rigl", storage="dense"), config(regrow=0.3)])
def test_regrowth_in_a_compiled_model(settings):
    masks = []
    for compiled in (False, True):
        model = mlp()
        sparsifier, optimizer = started(model, settings)
        called = torch.compile(model, backend="eager") if compiled else model
        run(called, sparsifier, optimizer)
        masks.append([target.mask.clone() for target in sparsifier.targets])
    assert all(torch.equal(one, other) for one, other in zip(*masks, strict=True))
    assert sparsifier.sparsity >= 0.75


def test_a_layer_that_was_compiled_by_itself_is_followed():
    """torch.compile keeps the call of the layer that it was given, whatever stands in its place later."""
    model = mlp()
    model[0] = torch.compile(model[0], backend="eager")
    sparsifier, optimizer = started(model, config())
    run(model, sparsifier, optimizer)
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
    for step in range(STEPS):  # in turns, as in a search
        for training in trainings:
            run(*training, until=step + 1)
    assert is_compiling()
    model, sparsifier, optimizer = trainings[0][0], *started(mlp(), config("rigl"))
    with torch.no_grad():
        next(sparsifier.model.parameters()).fill_(torch.nan)
    with pytest.raises(KronblocksError, match="diverged"):
        run(sparsifier.model, sparsifier, optimizer)
    assert is_compiling()
    stopped = (model := mlp(), *started(model, config("rigl", schedule=ScheduleConfig(update_every=2))))
    run(*stopped, until=3)
    assert stopped[1].measures_growth and not is_compiling()
    copy.deepcopy(stopped[1])
    del stopped, model
    gc.collect()
    assert is_compiling()


def test_a_compiled_step_of_the_optimiser_with_regrowth():
    model = mlp()
    sparsifier, optimizer = started(model, config("rigl"))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
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


def ordinary_loop(
    settings: dict[str, Any] | None, users_plan: str | None = None, *, compiled: bool = True, steps: int = 60
) -> int:
    """Compilations of a training with layers of four shapes, validated before it and after each short last batch, of 20 rows."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 16)
    )
    schedule = ScheduleConfig(update_every=2)
    common = {"block_size": 4, "target_sparsity": 0.9, "schedule": schedule, "measure_plans": False}
    sparsifier = None if settings is None else sparsify_(model, SparsityConfig(**{**common, **settings}))
    if users_plan is not None:
        model[2].plan = users_plan
        model[2].use_plan_(users_plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if sparsifier is not None:
        sparsifier.attach(optimizer, total_steps=steps)
    counter = CompileCounterWithBackend("eager")
    called = torch.compile(model, backend=counter, fullgraph=True) if compiled else model

    def validate() -> None:
        model.eval()
        with torch.no_grad():
            for rows in (64, 24):
                x = torch.randn(rows, 32)
                torch.testing.assert_close(called(x), model(x))

    validate()
    for batch in range(steps):
        model.train()
        loss = called(torch.randn(20 if batch % 10 == 9 else 64, 32)).square().mean()
        optimizer.zero_grad()
        (loss if sparsifier is None else loss + sparsifier.penalty()).backward()
        optimizer.step()
        if batch % 10 == 9:
            validate()
    assert sparsifier is None or sparsifier.sparsity >= 0.9
    return counter.frame_count


OWN_CHANGES = {"two-phase": 1, "magnitude": 1}  # the lift, and the smaller values when healing begins, which are worth theirs
METHODS = [("two-phase", {}), ("two-phase", {"regrow": 0.3}), ("magnitude", {"storage": "packed"}), ("rigl", {}), ("kron-l1", {})]


@pytest.fixture(scope="module")
def dense() -> int:
    return ordinary_loop(None)


@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_an_ordinary_loop_stays_below_the_limit_of_recompilations(method, settings, dense):
    """Dense compiles at most 4 times: for training and for evaluation, each for one number of rows and then for any. A change of
    the layers is compiled for both again, knowing that rows vary: 2. The limit of 8 leaves room for two changes, of which those
    that a method needs come first, and the others go to plans.
    """
    assert dense <= 4
    assert 3 + 2 * OWN_CHANGES.get(method, 0) <= ordinary_loop({"method": method, **settings}) <= 4 + 2 * 2


def test_deaths_do_not_change_the_sizes_of_the_users_packed_plan():
    assert ordinary_loop({"method": "kron-l1"}, "packed") <= 4 + 2 * 2


def test_layers_are_watched_inside_checkpoints_of_a_compiled_model():
    """A checkpoint's part of compiled code may change nothing outside, such as what a watch has seen."""
    torch.compiler.reset()
    model = mlp()
    sparsifier, optimizer = started(model, config())
    called = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    called(torch.randn(6, 3, 32)).square().mean().backward()
    optimizer.step()
    assert sparsifier.state_dict()["planner"]["traffic"]["2"] == [18, True, "float32"]


def test_a_limit_below_what_the_lift_needs_is_told(processes):
    """In a process of its own: what other tests have compiled before decides in which step torch reaches its limit."""
    processes.run(train_below_and_at_the_limit)


def train_below_and_at_the_limit() -> None:
    told = pytest.warns(KronblocksWarning, match="up to 6 times .*recompile_limit is 4")
    with torch._dynamo.config.patch(recompile_limit=4), told, pytest.raises(FailOnRecompileLimitHit):
        ordinary_loop({})
    with torch._dynamo.config.patch(recompile_limit=6), warnings.catch_warnings():
        warnings.simplefilter("error", KronblocksWarning)
        assert ordinary_loop({}) <= 6
