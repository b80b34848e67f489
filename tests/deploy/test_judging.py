"""Whole models are judged by a clock that stands still but for what layers take, so that the best one is known."""

from __future__ import annotations

import importlib
import itertools
import json
import random
from typing import Any

import pytest
import torch
from tests.helpers import mlp
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear, SparsityConfig, export, sparsify_
from kronblocks.deploy import judging
from kronblocks.ops.costs.choice import DeployedForm

OPTIONS = ("dense", "packed", "tile_first")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time, self.turns = 0.0, 0
        monkeypatch.setattr(judging, "now", lambda: self.time)

    def run(self, cost):
        def run(forms):
            self.turns += 1
            self.time += (seconds := cost(forms))
            return seconds

        return run


def search(clock: Clock, cost, groups: dict[str, list[int]], count: int, **settings: Any) -> judging.Judged:
    wholes = {"layers": ("dense",) * count, "packed": ("packed",) * count, "dense": ("dense",) * count}
    wholes["as it was"] = ("tile_first",) * count
    return judging.judge(wholes, groups, [OPTIONS] * count, clock.run(cost), **{"budget": 1e9, **settings})


@pytest.mark.parametrize("seed", range(5))
def test_the_best_mixture_is_found(monkeypatch, seed):
    draw, groups = random.Random(seed), {"a": [0, 2], "b": [1], "c": [3, 4, 5]}
    table = {(name, form): draw.choice([1, 2, 3, 5, 8]) for name in groups for form in OPTIONS}
    noise = random.Random(seed)

    def cost(forms):
        forms = forms or ("tile_first",) * 6
        return sum(table[name, forms[layers[0]]] for name, layers in groups.items()) * noise.uniform(0.995, 1.005)

    found = search(Clock(monkeypatch), cost, groups, 6)
    least = sum(min(table[name, form] for form in OPTIONS) for name in groups)
    assert found.complete and sum(table[name, found.forms[layers[0]]] for name, layers in groups.items()) == least
    assert found.seconds["exported"] == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_never_slower_than_dense_or_the_model(monkeypatch, seed):
    draw, groups = random.Random(seed), {str(i): [i] for i in range(4)}
    table = {forms: draw.uniform(1, 2) for forms in itertools.product(OPTIONS, repeat=4)}  # no layer says anything of another
    found = search(Clock(monkeypatch), lambda forms: table[forms or ("tile_first",) * 4], groups, 4)
    assert table[found.forms] == found.seconds["exported"] <= min(found.seconds["dense"], found.seconds["model"])
    assert found.seconds["exported"] <= found.seconds["packed"]


def test_the_budget_ends_the_search(monkeypatch):
    clock, groups = Clock(monkeypatch), {str(i): [i] for i in range(50)}
    said: list[str] = []
    found = search(clock, lambda forms: 1.0, groups, 50, budget=30.0, progress=said.append)
    assert not found.complete and clock.time < 60 and said[0] == "4 whole models"
    slow = Clock(monkeypatch)
    assert search(slow, lambda forms: 100.0, groups, 50, budget=30.0).timed == 3 and slow.turns == 7


def test_noise_alone_switches_nothing(monkeypatch):
    noise = random.Random(0)
    found = search(Clock(monkeypatch), lambda forms: noise.gauss(1, 0.004), {str(i): [i] for i in range(6)}, 6)
    assert len(set(found.forms)) == 1


@pytest.fixture
def taken(monkeypatch):
    """Export with a clock that layers move: seconds by class, or by class and number of rows."""
    monkeypatch.setenv("KRONBLOCKS_MEASURE", "on")
    forms = importlib.import_module("kronblocks.deploy.forms")
    monkeypatch.setattr(forms, "choose_deployed", lambda problem, int8: DeployedForm("dense", {"dense": 1.0, "packed": 2.0}))
    clock, seconds = Clock(monkeypatch), {}

    def slow(kind, name):
        forward = kind.forward

        def timed(self, input):
            key = (name, input.shape[0])
            clock.time += seconds.get((name, self.out_features), seconds.get(key, seconds.get(name, 0)))
            return forward(self, input)

        monkeypatch.setattr(kind, "forward", timed)

    for kind, name in ((nn.Linear, "dense"), (BlockSparseLinear, "packed"), (KroneckerBlockLinear, "factored")):
        slow(kind, name)
    return seconds


def sparse(method: str = "static") -> nn.Sequential:
    model = mlp(32, 64, 64, 16)
    sparsify_(model, SparsityConfig(method, block_size=8, target_sparsity=0.5, measure_plans=False))
    return model


def test_the_whole_decides_against_layers_alone(taken):
    taken |= {"dense": 3.0, "packed": 2.0, ("packed", 16): 4.0}
    model, x = sparse(), torch.randn(5, 32)
    said: list[str] = []
    exported = export(model, x, slim=False, budget=1e9, progress=said.append)
    assert [layer.form for layer in exported.layers] == ["packed", "packed", "dense"] and exported.whole.complete
    assert exported.layers[0].why.startswith("the whole model is faster with it; alone at 5 rows 1.00 s, packed 2.00 s")
    assert exported.layers[2].why.startswith("at 5 rows")
    whole = exported.whole.seconds
    assert (whole["exported"], whole["dense"], whole["model"]) == (7.0, 9.0, 8.0)
    assert json.loads(json.dumps(exported.manifest()))["whole"]["seconds"]["dense"] == 9.0
    assert "the whole model: 7.00 s, as it was 8.00 s, dense 9.00 s" in str(exported) and "*.0 packed" not in said
    torch.testing.assert_close(exported.model(x), model.eval()(x))
    assert [type(layer).__name__ for layer in model] == ["BlockSparseLinear", "Tanh"] * 2 + ["BlockSparseLinear"]


def test_phases_count_by_their_weights(taken):
    taken |= {("dense", 7): 1.0, ("packed", 7): 4.0, ("dense", 1): 2.0, ("packed", 1): 1.0}
    phases = {"prefill": torch.randn(7, 32), "decode": lambda model: model(torch.ones(1, 32))}
    forms = {}
    for steps in (1, 100):
        exported = export(sparse(), phases=phases, weights={"decode": steps}, slim=False, budget=1e9)
        forms[steps] = {layer.form for layer in exported.layers}
        assert exported.whole.weights == {"prefill": 1.0, "decode": steps}
        assert exported.whole.seconds["dense"] == 3 * (1 + 2 * steps)
    assert forms == {1: {"dense"}, 100: {"packed"}}
    with pytest.raises(KronblocksError, match="names 'decoding', which is no phase: there are prefill, decode"):
        export(sparse(), phases=phases, weights={"decoding": 3})
    with pytest.raises(KronblocksError, match="weights= of all phases are 0"):
        export(sparse(), phases=phases, weights={"prefill": 0, "decode": 0})
    with pytest.raises(KronblocksError, match="weights= is for phases="):
        export(sparse(), torch.ones(1, 32), weights={"decode": 3})
    with pytest.raises(KronblocksError, match="give an input beside it, phases="):
        export(sparse(), lambda model: model(torch.ones(1, 32)).argmax(1))
    with pytest.raises(KronblocksError, match=r"export\(model, example\), or export\(model, phases="):
        export(sparse(), torch.ones(1, 32), phases=phases)


def test_factors_stay_as_they_were_if_that_is_fastest(taken):
    taken |= {"dense": 3.0, "packed": 2.0, "factored": 1.0}
    model = mlp(32, 64, 16)
    sparsify_(model, SparsityConfig("two-phase", block_size=8, rank=1, measure_plans=False))
    for layer in (model[0], model[2]):
        layer.use_plan_("tile_first")
    exported = export(model, torch.randn(5, 32), slim=False, budget=1e9)
    assert [layer.form for layer in exported.layers] == ["factored"] * 2 and exported.model[0].active_plan == "tile_first"


def test_a_compiled_model_is_judged_compiled(taken, monkeypatch):
    taken |= {"dense": 3.0, "packed": 2.0}
    wholes = importlib.import_module("kronblocks.deploy.wholes")
    compiled: list[Any] = []

    class Context:
        def __call__(self, module):
            compiled.append(module)
            return module

    model = sparse()
    outer: Any = torch.compile(model, backend="eager")
    made = wholes.Stage.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._compile, self.original = Context(), model

    monkeypatch.setattr(wholes.Stage, "__init__", init)
    monkeypatch.setattr(torch._dynamo.eval_frame.OptimizedModule, "forward", lambda self, *args: self._orig_mod(*args))
    exported = export(outer, torch.randn(5, 32), slim=False, budget=1e9)
    assert len(compiled) == 3 and {layer.form for layer in exported.layers} == {"packed"}
    assert exported.whole.seconds["dense"] == 9.0 and type(exported.model) is nn.Sequential


def test_a_call_that_changes_its_example_gets_a_copy(taken):
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = sparse()

        def forward(self, x, cache):
            cache.seen.append(1)
            return self.net(x) * len(cache.seen)

    class Cache:
        def __init__(self) -> None:
            self.seen: list[int] = []

    cache = Cache()
    exported = export(Cached(), {"x": torch.randn(5, 32), "cache": cache}, slim=False, budget=1e9)
    assert exported.error < 1e-5 and cache.seen == []


def test_with_a_real_clock(monkeypatch):
    monkeypatch.setenv("KRONBLOCKS_MEASURE", "on")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 16))
    sparsify_(model, SparsityConfig("static", block_size=4, target_sparsity=0.5, convolutions=True, measure_plans=False))
    x = torch.randn(2, 4, 8, 8)
    exported = export(model, x, budget=0.2)
    whole = exported.whole
    assert whole.timed >= 2 and {"exported", "dense", "model", "layers", "packed", "as it was"} <= whole.seconds.keys()
    assert min(whole.seconds.values()) > 0
    torch.testing.assert_close(exported.model(x), model.eval()(x))
    assert export(model, x, budget=0).whole is None
