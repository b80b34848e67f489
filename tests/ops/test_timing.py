"""Measuring: what is run, that nothing leaks in or out. No time is asserted, only that there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kronblocks.ops import BlockGrid, BlockSize, Problem
from kronblocks.ops.costs import timing
from kronblocks.ops.costs.counts import estimated_seconds, intermediate_bytes
from kronblocks.ops.costs.timing import REFERENCE, affordable, as_measured, candidates, measure, measured_rows
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.plans import possible_plans

META = torch.device("meta")
PROBLEM = Problem(BlockGrid(24, 32, BlockSize(4, 8)), rank=2, tile_groups=3, rows=10, density=0.5)
IN_CONVOLUTIONS = {  # of 8 channels, and 5 images
    "2x2": Convolution(ConvGeometry(2, 2, 1, 0, 0, 1), (1, 1), (2, 1)),
    "stride": Convolution(ConvGeometry(4, 1, 1, 1, 0, 0, 2, 1), (2, 3), (1, 2)),
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "BUDGET", 0.0)


@pytest.fixture
def all_plans(monkeypatch):
    monkeypatch.setattr(timing, "_NEAR", float("inf"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.usefixtures("all_plans")
def test_every_plan_and_the_reference_are_timed(rank, training, dtype):
    found = measure(dataclasses.replace(PROBLEM, rank=rank, training=training, dtype=dtype))
    assert found.keys() == {REFERENCE, *possible_plans(rank)}
    assert all(0 < value < 60 for value in found.values())


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.usefixtures("all_plans")
def test_all_plans_are_given_the_same_product(rank, monkeypatch):
    """What is timed as a plan must compute what the others compute, dead blocks and bias included."""
    outputs: list[torch.Tensor] = []
    problem = dataclasses.replace(PROBLEM, rank=rank, training=False, dtype=torch.float64)
    for name, run in timing._runs(problem).items():
        y = run()
        assert isinstance(y, torch.Tensor) and y.shape == (10, 24)
        outputs += [y] if name != REFERENCE else []
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-10, atol=1e-10)  # float64 sums in another order


@pytest.mark.parametrize("name", IN_CONVOLUTIONS)
@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.usefixtures("all_plans")
def test_and_the_same_convolution(rank, name):
    around, outputs = IN_CONVOLUTIONS[name], []
    problem = dataclasses.replace(PROBLEM, rank=rank, training=False, dtype=torch.float64, convolution=around)
    for plan, run in timing._runs(problem).items():
        y = run()
        assert isinstance(y, torch.Tensor) and y.shape == (5, 24, *around._known_size)
        outputs += [y] if plan != REFERENCE else []
    assert len(outputs) == len(possible_plans(rank))
    for y in outputs[1:]:
        torch.testing.assert_close(y, outputs[0], rtol=1e-10, atol=1e-10)  # float64 sums in another order
    found = measure(dataclasses.replace(problem, training=True))
    assert found.keys() == {REFERENCE, *possible_plans(rank)}


def test_few_images_stand_for_many_and_a_part_for_a_large_one():
    def measured(rows: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        around = Convolution(ConvGeometry(1, 1), size=size)
        few = as_measured(Problem(BlockGrid(64, 64, BlockSize(4, 4)), None, rows=rows, convolution=around))
        assert few.convolution is not None
        return few.rows, few.convolution._known_size

    assert measured(8 * 49, (7, 7)) == (8 * 49, (7, 7))
    assert measured(64 * 900, (30, 30)) == (4 * 900, (30, 30))
    assert measured(8 * 10_000, (100, 100)) == (10_000, (100, 100))
    assert measured(8 * 1_000_000, (1000, 1000)) == (16_000, (16, 1000))


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.usefixtures("all_plans")
def test_gradients_are_those_that_a_layer_computes(input_grad):
    for run in timing._runs(dataclasses.replace(PROBLEM, input_grad=input_grad)).values():
        with torch.enable_grad():
            gradients = run()
        assert isinstance(gradients, tuple)
        assert ((10, 32) in [tuple(g.shape) for g in gradients]) == input_grad
        assert (24,) in [tuple(g.shape) for g in gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")]
)
def test_modes_of_the_caller_do_not_leak_in_and_nothing_leaks_out(mode, training):
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    with mode():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
        assert len(measure(dataclasses.replace(PROBLEM, training=training))) > 1
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() == default


def test_measuring_in_the_hook_of_an_optimiser():
    layer, found = nn.Linear(3, 3), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: found.append(measure(PROBLEM)))
    layer(torch.ones(2, 3)).sum().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    assert len(found[0]) > 1 and torch.equal(layer.weight.grad, gradient)


def test_only_plans_near_the_best_estimate_are_run():
    problem = Problem(BlockGrid(1024, 1024, BlockSize(16, 16)), rank=1, rows=2048)
    least = min(estimated_seconds(problem, plan) for plan in possible_plans(1))
    assert all(estimated_seconds(problem, plan) <= 5 * least for plan in candidates(problem))
    assert 0 < len(candidates(problem)) < 4


def test_dense_is_always_timed_on_a_gpu():
    """Whatever the estimates say, which were never compared with one: so no layer is slower than dense by choice."""
    problem = Problem(BlockGrid(4096, 4096, BlockSize(64, 64)), rank=None, rows=20_000, density=0.01, device="cuda")
    least = min(estimated_seconds(problem, plan) for plan in possible_plans(None))
    assert estimated_seconds(problem, "dense") > 5 * least
    assert set(candidates(problem)) == {"dense", "packed"}


def test_plans_of_absurd_memory_are_not_run():
    grid, dtype = BlockGrid(4096, 4096, BlockSize(16, 16)), torch.bfloat16
    problem = Problem(grid, rank=4, tile_groups=256, rows=4096, dtype=dtype, device="mps")  # where no kernels of ours serve
    assert intermediate_bytes(problem, "tile_first") > 2**31
    assert not affordable(problem, "tile_first") and "tile_first" not in candidates(problem)
    assert affordable(problem, "packed")


@pytest.mark.parametrize(
    ("rows", "features", "measured"),
    [(0, 64, 1), (1, 4096, 1), (200, 4096, 200), (100_000, 64, 4096), (5000, 1024, 2048), (5000, 4096, 256)],
)
def test_few_rows_stand_for_many(rows, features, measured):
    assert measured_rows(Problem(BlockGrid(features, features, BlockSize(4, 4)), 2, rows=rows)) == measured


def test_time_grows_with_the_rows_that_were_not_run(monkeypatch):
    monkeypatch.setattr(timing, "_interleaved", lambda runs, synchronize, calls: dict.fromkeys(runs, 2.0))
    assert set(measure(dataclasses.replace(PROBLEM, rows=3 * 4096)).values()) == {6.0}


def test_a_plan_that_runs_out_of_memory_is_left_out(monkeypatch):
    def bursts(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "packed_linear", bursts)
    monkeypatch.setattr(timing, "_NEAR", float("inf"))
    assert measure(dataclasses.replace(PROBLEM, rank=None)).keys() == {REFERENCE, "dense"}


class Clock:
    """Seconds that pass only where a call takes them, whatever else the machine does; it stands in for `time` in timing.py."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(timing, "time", found)
    return found


def test_the_clearly_slower_drop_out(clock):
    turns = {"slow": 0, "quick": 0}

    def run(name: str, seconds: float) -> None:
        turns[name] += 1
        clock.now += seconds

    found = timing._interleaved({"slow": lambda: run("slow", 0.05), "quick": lambda: run("quick", 1e-5)}, lambda: None)
    assert turns["slow"] == 2 and turns["quick"] > 3 and found == pytest.approx({"slow": 0.05, "quick": 1e-5})


def test_one_slow_call_of_a_quick_plan_does_not_put_it_out(clock):
    """Something else had the cores in its first counted call: it is still in the running, and its least time counts."""
    calls = {"unlucky": 0, "steady": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        clock.now += 0.02 if name == "unlucky" and calls[name] == 2 else seconds

    found = timing._interleaved({"unlucky": lambda: run("unlucky", 1e-4), "steady": lambda: run("steady", 1e-3)}, lambda: None)
    assert found == pytest.approx({"unlucky": 1e-4, "steady": 1e-3})


def test_short_calls_fill_a_turn_where_a_device_computes_beside_the_launches(clock):
    called: list[str] = []

    def run(name: str) -> None:
        called.append(name)

    def synchronize() -> None:
        called.append("wait")
        clock.now += 1e-4

    found = timing._interleaved({"quick": lambda: run("quick")}, synchronize, 20)
    assert called[:4] == ["quick", "wait", "quick", "wait"] and called[4:25] == ["quick"] * 20 + ["wait"]
    assert 0 < found["quick"] < 1e-4  # of one call: the wait is shared
