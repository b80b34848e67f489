"""Plans in a training: chosen for what reaches the layers, switched when it pays, replayed on resume, the same on all ranks."""

from __future__ import annotations

import gc
import io
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.processes import code
from torch import nn

from kronblocks import KronblocksError, ScheduleConfig, SparsityConfig, parameter_groups, sparsify_
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.ops import Problem
from kronblocks.ops.costs import timing, timing_cache
from kronblocks.ops.costs.timing import REFERENCE
from kronblocks.ops.costs.timing_cache import forget_timings
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.plans import possible_plans

STEPS = 40


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    """On, with a cache of its own and every plan a candidate."""
    monkeypatch.setenv("KRONBLOCKS_MEASURE", "1")
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    monkeypatch.setattr(timing, "_NEAR", float("inf"))
    monkeypatch.setattr(timing, "BUDGET", 0.0)
    forget_timings()
    yield
    forget_timings()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(timing_cache, "measure", found)
    return found


class Clock:
    """Stands for `measure`: says how long each plan takes, and remembers what was asked."""

    def __init__(self) -> None:
        self.calls: list[Problem] = []
        self.seconds: dict[str, Callable[[Problem], float]] = {plan: lambda p: 1.0 for plan in possible_plans(1)}

    def __call__(self, problem: Problem) -> dict[str, float]:
        self.calls.append(problem)
        return {REFERENCE: 1.0} | {plan: self.seconds[plan](problem) for plan in possible_plans(problem.rank)}


class Training:
    """A loop over random batches; the second layer's plan at the end of every step."""

    def __init__(self, seed: int = 0, batch: int = 16, **config: Any) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))
        self.sparsifier = sparsify_(self.model, SparsityConfig(**{"block_size": 4, "rank": 2, "target_sparsity": 0.75, **config}))
        self.batch, self.forward = batch, self.model.__call__
        self.plans: list[str] = []

    def start(self, state: dict[str, Any] | None = None) -> Training:
        if state is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
            self.model.load_state_dict(state["model"])
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, lr=1e-2))
        self.sparsifier.attach(self.optimizer, total_steps=STEPS)
        if state is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        return self

    def run(self, until: int) -> Training:
        for step in range(self.sparsifier.step, until):
            x = torch.randn(self.batch, 32, generator=torch.Generator().manual_seed(step))
            loss = self.forward(x).square().mean() + self.sparsifier.penalty()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.plans.append(self.model[2].active_plan)
        return self

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "sparsifier": self.sparsifier}
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def changes(plans: list[str]) -> dict[int, str]:
    """The steps after which the plan is another one, from 1."""
    return {step: plan for step, plan in enumerate(plans, 1) if step == 1 or plan != plans[step - 2]}


def test_plans_are_chosen_for_what_reaches_the_layers(clock):
    training = Training(batch=48).start()
    training.model.eval()(torch.randn(3, 32))
    with torch.no_grad():
        training.model.train()(torch.randn(5, 32))
    training.run(1)
    assert [(p.rows, p.grid.in_features, p.input_grad) for p in clock.calls] == [(48, 32, False), (48, 24, True)]
    assert all(p.training and p.dtype == torch.float32 for p in clock.calls)
    assert [training.model[0].rows, training.model[2].rows] == [48, 48]
    assert not training.model[0]._forward_pre_hooks, "one look is enough"


def test_tokens_keywords_and_autocast(clock):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(32, 16)})
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=STEPS)
    with torch.autocast("cpu"):
        model["fc"](input=torch.randn(4, 6, 32)).sum().backward()
    optimizer.step()
    (problem,) = clock.calls
    assert (problem.rows, problem.dtype) == (24, torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_in_convolutions_are_timed_as_convolutions(compiled, clock, monkeypatch):
    """Of the images that come, which the look at them does not unfold; the state remembers them."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (1, 3), stride=2, padding=(0, 1)))
    settings = SparsityConfig(method="static", block_size=4, target_sparsity=0.5, convolutions=True)
    sparsifier = sparsify_(model, settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=STEPS)
    monkeypatch.setattr(UnfoldedConv, "_multiply_patches", lambda *_: pytest.fail("rows of patches are copied"))
    for layer in (model[0].linear, model[2].linear):
        layer.use_plan_("dense" if layer is model[2].linear else "packed")  # with stride 2 packed products need patches
    forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    forward(torch.randn(3, 4, 9, 12)).square().mean().backward()
    optimizer.step()
    wanted = [
        Convolution(ConvGeometry(3, 3), (1, 1), (7, 10)),
        Convolution(ConvGeometry(1, 3, 0, 0, 1, 1), (2, 2), (4, 5)),
    ]
    assert [(p.convolution, p.rows, p.images, p.input_grad) for p in clock.calls] == [
        (wanted[0], 3 * 70, 3, False),
        (wanted[1], 3 * 20, 3, True),
    ]
    assert [model[0].linear.convolution, model[2].linear.convolution] == wanted
    traffic = sparsifier.state_dict()["planner"]["traffic"]
    assert [each[3] for each in traffic.values()] == [[7, 10], [4, 5]]
    other = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, (1, 3), stride=2, padding=(0, 1)))
    resumed = sparsify_(other, settings)
    resumed.load_state_dict(sparsifier.state_dict())
    assert resumed.state_dict()["planner"]["traffic"] == traffic
    torch.compiler.reset()


def test_rows_of_the_config_come_first(clock):
    Training(batch=48, rows=7).start().run(1)
    assert {problem.rows for problem in clock.calls} == {7}
    assert [p.input_grad for p in clock.calls] == [False, True]


def test_a_layer_that_nothing_has_reached_keeps_its_plan(clock):
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(32, 16), "idle": nn.Linear(16, 16)})
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for step in range(1, 11):
        y = model["used"](torch.randn(4, 32))
        (model["idle"](y) if step == 10 else y).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (16 in {p.grid.in_features for p in clock.calls}) == (step == 10)


def test_the_quickest_plan_is_taken_after_the_first_step_and_kept(clock):
    clock.seconds["coeff_first"] = lambda p: 0.5
    training = Training().start().run(10)  # the lift comes after step 11
    assert changes(training.plans) == {1: "coeff_first"}


def test_plans_follow_the_density_at_mask_updates(clock):
    """Packed gets quicker as blocks die; a layer switches once it is a tenth quicker, at a mask update."""
    clock.seconds["packed"] = lambda p: 1.6 * p.density
    training = Training(target_sparsity=0.9, schedule=ScheduleConfig(update_every=3, end=0.9)).start()
    schedule = training.sparsifier.schedule
    densities = []
    for step in range(1, schedule.lift_step):
        training.run(step)
        densities.append(training.model[2].density)
    first, switch = changes(training.plans)
    assert first == 1 and training.plans[switch - 1] == "packed" and schedule.is_update(switch)
    # linear between measured densities, so 1.6 d: a tenth better than 1 below d = 0.568
    assert densities[switch - 1] < 1 / 1.1 / 1.6 < max(d for d in densities[: switch - 1] if d < densities[0])


def test_no_plan_is_given_up_for_one_that_is_hardly_quicker(clock):
    clock.seconds["tile_first"] = lambda p: 0.9
    clock.seconds["packed"] = lambda p: 0.9 if p.density == 1 else 0.83
    training = Training().start().run(10)
    assert changes(training.plans) == {1: "tile_first"}


def test_after_the_lift_the_choice_is_new(clock):
    clock.seconds["packed"] = lambda p: 0.99 if p.rank is None else 5.0
    training = Training().start().run(STEPS)
    lift = training.sparsifier.schedule.lift_step
    assert changes(training.plans)[lift] == "packed", "no plan was given up, since the layer is new"
    assert {p.rank for p in clock.calls} == {2, None}


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 5, 10, 11, 12, 20, 30])
def test_a_resumed_training_replays_decisions_and_timings(clock, stop, tmp_path, monkeypatch):
    """Each measuring gives other times: only replayed ones can lead to the same choices."""
    noise = torch.Generator().manual_seed(0)
    for plan in clock.seconds:
        clock.seconds[plan] = lambda p: 0.5 + float(torch.rand((), generator=noise))
    whole = Training().start().run(STEPS)
    forget_timings()
    first = Training().start().run(stop)
    state = first.state()
    asked = len(clock.calls)
    known = set(state["sparsifier"]["planner"]["tables"])
    forget_timings()
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path))
    resumed = Training(seed=99).start(state)
    assert resumed.model[2].active_plan == first.model[2].active_plan and len(clock.calls) == asked
    resumed.run(STEPS)
    assert first.plans + resumed.plans == whole.plans
    assert not {timing_cache._key(p) for p in clock.calls[asked:]} & known
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_the_state_alone_is_enough_for_what_was_measured(clock, monkeypatch):
    """The cache has gone: what the first part measured is not measured again."""
    monkeypatch.setenv("KRONBLOCKS_CACHE", "off")
    first = Training().start().run(12)
    state, asked = first.state(), len(clock.calls)
    first.run(13)
    new = clock.calls[asked:]  # a layer may have got another density
    assert len(new) < asked
    forget_timings()
    Training(seed=99).start(state).run(13)
    assert clock.calls[asked + len(new) :] == new


@pytest.mark.parametrize("method", ["two-phase", "kron-l1"])
def test_with_real_timings(method):
    """Whatever the clock says, an interrupted training equals the whole one, because the machine's timings are kept."""
    whole = Training(method=method).start().run(STEPS)
    forget_timings()
    first = Training(method=method).start().run(13)
    forget_timings()
    resumed = Training(method=method, seed=99).start(first.state()).run(STEPS)
    assert first.plans + resumed.plans == whole.plans
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    assert whole.sparsifier.sparsity == resumed.sparsifier.sparsity


def test_measuring_does_not_touch_the_random_numbers_of_the_training(monkeypatch):
    states = []
    for setting in ("1", "0"):
        monkeypatch.setenv("KRONBLOCKS_MEASURE", setting)
        Training().start().run(STEPS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("how", ["config", "environment"])
def test_measuring_can_be_switched_off(clock, how, monkeypatch):
    if how == "environment":
        monkeypatch.setenv("KRONBLOCKS_MEASURE", "0")
    Training(measure_plans=how != "config").start().run(STEPS)
    assert not clock.calls


def test_estimates_too_lead_to_other_plans_as_blocks_die(clock, monkeypatch):
    monkeypatch.setattr("kronblocks.ops.costs.choice.estimated_seconds", lambda p, plan: p.density if plan == "packed" else 0.8)
    training = Training(measure_plans=False).start().run(13)
    assert changes(training.plans)[1] != "packed" and training.plans[-1] == "packed"


def test_one_candidate_is_not_timed(clock, monkeypatch):
    monkeypatch.setattr(timing, "_NEAR", 1.0)
    Training().start().run(STEPS)
    assert not clock.calls


def test_the_users_plan_stays(clock):
    training = Training()
    training.model[2].plan = "tile_first"
    training.model[2].use_plan_("tile_first")
    training.start().run(10)
    assert changes(training.plans) == {1: "tile_first"}
    assert {p.grid.in_features for p in clock.calls} == {32}


def test_removing_the_attachment_removes_the_looks():
    training = Training()
    optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    handle = training.sparsifier.attach(optimizer, total_steps=STEPS)
    assert training.model[0]._forward_pre_hooks
    handle.remove()
    assert not training.model[0]._forward_pre_hooks


@pytest.mark.parametrize(
    "damage",
    [
        {"traffic": {"0": [1, 2]}},
        {"traffic": {"0": [16, True, "load"]}},
        {"traffic": {"0": [16, True, "nothing"]}},
        {"traffic": None},
        {"chosen": 3},
        {"tables": {"a": 3}},
    ],
)
def test_damaged_states_are_refused(damage, clock):
    state = Training().start().run(3).state()["sparsifier"]
    with pytest.raises(KronblocksError, match="part on plans is damaged"):
        Training().sparsifier.load_state_dict({**state, "planner": {**state["planner"], **damage}})


def test_compiled_models_are_watched_without_being_compiled_again(clock):
    """The look is part of the compiled code, and stays there; with one plan throughout, one graph serves."""
    from torch._dynamo.testing import CompileCounterWithBackend

    gc.collect()  # a sparsifier that nobody has any more may still hold compiled code back
    torch.compiler.reset()
    training = Training(schedule=ScheduleConfig(start=0.5, end=0.9)).start()
    clock.seconds[training.model[0].active_plan] = lambda p: 0.5
    counter = CompileCounterWithBackend("aot_eager")
    training.forward = torch.compile(training.model, fullgraph=True, backend=counter)
    training.run(8)
    assert counter.frame_count == 1
    assert [(p.rows, p.input_grad) for p in clock.calls] == [(16, False), (16, True)]
    torch.compiler.reset()


RANKS = """
    import sys
    import torch
    from torch import distributed, nn
    from kronblocks import SparsityConfig, parameter_groups, sparsify_
    from kronblocks.ops.costs import timing
    from kronblocks.ops.costs import timing_cache
    from kronblocks.ops.plans import possible_plans

    rank, asked = int(sys.argv[1]), 0

    def measure(problem):  # each rank's own clock
        global asked
        asked += 1
        plans = possible_plans(problem.rank)
        best = "coeff_first" if problem.rank else "packed"
        return {"F.linear": 1.0} | {plan: 0.5 if plan == (best if rank == 0 else "dense") else 1.0 for plan in plans}

    timing_cache.measure = measure
    timing._NEAR = float("inf")
    distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))
    sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.75))
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=40)
    seen = []
    for step in range(40):
        optimizer.zero_grad()
        model(torch.ones(8, 32)).square().mean().backward()
        optimizer.step()
        seen.append([layer.active_plan for layer in (model[0], model[2])])
    distributed.destroy_process_group()
    assert (asked > 0) == (rank == 0), asked
    assert seen[:10] == [["coeff_first"] * 2] * 10, seen
    assert seen[10:] == [["packed"] * 2] * 30, seen
"""


@pytest.mark.slow
def test_rank_0_decides_for_all(tmp_path, processes):
    ranks = [processes.start(code, textwrap.dedent(RANKS), str(rank), str(tmp_path / "meeting")) for rank in (0, 1)]
    for status, said in [each.end() for each in ranks]:
        assert status == 0, said
