"""Searches find the size that a task is made for, and say why the others lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from tests.search.small_task import CONFIG, convolutional, model, task
from torch import nn

from kronblocks import KronblocksError, KroneckerBlockLinear, SparsityConfig, sparsify_
from kronblocks.core.errors import Diverged
from kronblocks.ops import BlockSize
from kronblocks.ops.costs.choice import DeployedForm
from kronblocks.search import halving
from kronblocks.search.candidates import Candidate
from kronblocks.search.config import MixtureConfig, SearchConfig
from kronblocks.search.halving import _note, find_block_size
from kronblocks.search.judging import Result, judge, standings
from kronblocks.search.mixture import find_block_size_in_mixture_
from kronblocks.search.report import Path, Rung, SearchReport
from kronblocks.search.task import Trial


def test_a_trial_is_the_training_that_the_config_means():
    trial = Trial(model(), CONFIG, task(), 40, seed=3)
    before = [p.clone() for p in model().parameters()]
    assert isinstance(trial.model[0], KroneckerBlockLinear)
    data = task().batches(0)
    for _ in range(40):
        trial.step(next(data))
    assert trial.sparsifier.sparsity == 0.75 and trial.seconds_per_step > 0
    assert all(torch.equal(a, b) for a, b in zip(before, model().parameters(), strict=True))
    other = Trial(model(), CONFIG, task(), 40, seed=3)
    data = task().batches(0)
    for _ in range(40):
        other.step(next(data))
    assert torch.equal(task().judge(trial.model), task().judge(other.model))


@pytest.mark.parametrize("method", ["two-phase", "magnitude", "group-lasso", "rigl"])
def test_inference_time_is_that_of_the_exported_layers_however_they_are_stored(monkeypatch, method):
    """A made-up time, by rows and live weights, of packed problems."""
    asked = []

    def deployed(problem):
        asked.append(problem)
        return DeployedForm("packed", {"packed": 1e-6 * problem.rows * problem.density * problem.grid.weights})

    monkeypatch.setattr(halving, "choose_deployed", deployed)
    config = SparsityConfig(method, rank=2 if method == "two-phase" else None, target_sparsity=0.75, convolutions=True)
    search = SearchConfig(sizes=(2, 4), rounds=1, goal="inference-time")
    net = convolutional().double()
    doubled = dataclasses.replace(task(), losses=lambda net, batch: task().losses(net, tuple(part.double() for part in batch)))
    report = find_block_size(net, config, doubled, total_steps=80, search=search)
    assert {(p.rank, p.dtype, p.device, p.training) for p in asked} == {(None, torch.float64, "cpu", False)}
    sizes = [(p.grid.out_features, p.grid.in_features, str(p.grid.block), p.rows) for p in asked]
    # batches of 16, and 6 places of the kernel
    assert sizes == [(8, 12, "2x2", 16 * 6), (8, 48, "2x2", 16), (8, 12, "4x4", 16 * 6), (8, 48, "4x4", 16)]
    for path, problems in zip(report.paths, (asked[:2], asked[2:]), strict=True):
        live = sum(p.density * p.grid.weights for p in problems)
        assert live == pytest.approx(0.25 * (8 * 12 + 8 * 48), abs=16)  # within one block
        assert path.rungs[0].cost == sum(deployed(p).seconds for p in problems)


def test_a_trial_takes_the_whole_recipe():
    recipe = dataclasses.replace(task(), weight_decay=0.1, factor_weight_decay=0.05)
    recipe = dataclasses.replace(recipe, factor_lr_scale=2.0, tile_lr_scale=0.5, lifted_lr_scale=3.0)
    groups = {group["name"]: group for group in Trial(model(), CONFIG, recipe, 40, seed=0)._optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        **{"dense": 0.1, "no-decay": 0.0, "coefficients": 0.05, "tiles": 0.05, "lifted": 0.1},
    }
    recipe = dataclasses.replace(recipe, lifted_weight_decay=0.2)
    assert Trial(model(), CONFIG, recipe, 40, seed=0)._optimizer.param_groups[-1]["weight_decay"] == 0.2
    assert [groups[name]["max_lr"] / groups["dense"]["max_lr"] for name in ("coefficients", "tiles", "lifted")] == [2.0, 1.0, 3.0]


def test_halving_gives_every_candidate_its_steps_and_a_reason():
    dense, told = model(), []
    report = find_block_size(
        dense,
        CONFIG,
        task(),
        total_steps=400,
        search=SearchConfig(sizes=(2, 4, 8)),
        progress=lambda text, done: told.append((text, done)),
    )
    assert isinstance(dense[0], nn.Linear)  # it stays as it is
    assert report.winner is not None and all(path.why for path in report.paths)
    assert [path.why.startswith("won") for path in report.paths].count(True) == 1
    first = [path.rungs[0] for path in report.paths if path.rungs]
    assert {rung.steps for rung in first} == {int(400 / 3 / len(first))}
    assert report.steps <= 400
    assert told and all(0 < done <= 1 for _, done in told) and "round 1 of 3" in told[0][0]
    config = report.config(CONFIG)
    assert config.block == report.winner and sparsify_(dense, config).targets
    again = SearchReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report and str(report.winner) in str(report)
    for path in report.paths:
        if " ± " in path.why:
            assert path.cells()[1] in path.why


def test_halving_takes_convolutions_where_they_are_wanted():
    net = convolutional()
    config, before = dataclasses.replace(CONFIG, convolutions=True), net[1]
    report = find_block_size(net, config, task(), total_steps=100, search=SearchConfig(sizes=(2, 4), rounds=1))
    assert set(report.chosen) == {"1.linear", "3"} and net[1] is before
    assert [target.name for target in sparsify_(net, report.config(config)).targets] == ["1.linear", "3"]


def judged(losses: dict[str, list[float]], costs: dict[str, float], **settings):
    """Who goes on after one round, and why the others do not."""
    history = [results(losses, costs)]
    kept = [Candidate(BlockSize.parse(name), (), {}, 0.0) for name in losses]
    paths = {name: Path(BlockSize.parse(name), {}, 0.0, 0.0) for name in losses}
    last = settings.pop("last", True)
    _note(history[0], paths, 50)
    winners = judge(history, kept, paths, SearchConfig(**settings), last=last)
    return [str(c.block) for c in winners], {name: path.why for name, path in paths.items()}


def results(losses: dict[str, list[float]], costs: dict[str, float], steps: int = 50) -> dict[str, Result]:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    return {name: Result(tensor, costs[name], costs[name], steps) for name, tensor in tensors.items()}


LOSSES = {"2x2": [1.0, 1.0, 1.0, 1.0], "4x4": [1.004, 1.004, 1.004, 1.004], "8x8": [1.5, 1.5, 1.5, 1.5]}


COSTS = {"2x2": 3.0, "4x4": 2.0, "8x8": 1.0}


def test_the_cheapest_that_loses_nothing_wins_and_accuracy_can_be_asked_for():
    won, why = judged(LOSSES, COSTS)
    assert won == ["4x4"] and "4x4 takes 2e+03 ms, not 3e+03 ms" in why["2x2"] and "more than 2%" in why["8x8"]
    assert judged(LOSSES, COSTS, goal="accuracy")[0] == ["2x2"]
    assert judged(LOSSES, COSTS, tolerance=0.001)[0] == ["2x2"]
    assert judged(LOSSES, COSTS, tolerance=1.0)[0] == ["8x8"]


def test_times_that_differ_by_less_than_noise_leave_it_to_the_loss():
    won, why = judged(LOSSES, {"2x2": 2.0, "4x4": 1.95, "8x8": 1.0})
    assert won == ["2x2"] and "2x2 is as cheap and better" in why["4x4"]


def test_the_better_half_goes_on_the_best_then_the_cheap_ones_that_lose_nothing():
    losses = {"2x2": [1.0], "4x4": [1.01], "8x8": [1.015], "16x16": [1.016], "32x32": [1.4]}
    losses = {name: values * 2 for name, values in losses.items()}
    costs = {"2x2": 5.0, "4x4": 4.0, "8x8": 3.0, "16x16": 2.0, "32x32": 1.0}
    won, why = judged(losses, costs, last=False)
    assert won == ["2x2", "8x8", "16x16"] and "are better or cheaper" in why["4x4"] and "more than 2%" in why["32x32"]
    assert judged(losses, costs, last=False, goal="accuracy")[0] == ["2x2", "4x4", "8x8"]
    assert judged(LOSSES, COSTS, last=False)[0] == ["2x2", "4x4"]


def test_rounds_count_by_their_steps():
    first = results({"2x2": [1.0, 1.0], "4x4": [0.9, 0.9]}, {"2x2": 1.0, "4x4": 1.0}, steps=10)
    second = results({"2x2": [0.5, 0.5], "4x4": [0.6, 0.6]}, {"2x2": 3.0, "4x4": 1.0}, steps=30)
    found = standings([first, second], ["4x4", "2x2"])
    assert list(found) == ["2x2", "4x4"] and found["2x2"] == (0.0, 0.0, 2.5)
    assert found["4x4"].gap == pytest.approx(0.25 * -0.1 + 0.75 * 0.2)


def test_examples_that_are_as_bad_in_every_round_are_no_less_uncertain_for_it():
    one = {"2x2": [1.0, 1.0, 1.0, 1.0], "4x4": [1.1, 0.9, 1.3, 0.9]}
    other = {"2x2": [1.0, 1.0, 1.0, 1.0], "4x4": [0.9, 1.1, 0.7, 1.1]}
    first, again, opposite = (results(each, {"2x2": 1.0, "4x4": 1.0}) for each in (one, one, other))
    names = ["2x2", "4x4"]
    once = standings([first], names)["4x4"].error
    assert once == pytest.approx(torch.tensor([0.1, -0.1, 0.3, -0.1]).std().item() / 2)
    assert standings([first, again], names)["4x4"].error == pytest.approx(once)
    assert standings([first, opposite], names)["4x4"].error == pytest.approx(0, abs=1e-12)


def test_the_table_shows_the_means_that_decided():
    """4x4 is the worse one over all rounds and the better one in the last."""
    history = [
        results({"2x2": [1.0, 1.0], "4x4": [1.5, 1.5]}, {"2x2": 1.0, "4x4": 2.0}, steps=30),
        results({"2x2": [0.5, 0.5], "4x4": [0.4, 0.4]}, {"2x2": 3.0, "4x4": 4.0}, steps=10),
    ]
    paths = {name: Path(BlockSize.parse(name), {}, 0.0, 0.0) for name in ("2x2", "4x4")}
    for each, steps in zip(history, (30, 10), strict=True):
        _note(each, paths, steps)
    kept = [Candidate(path.block, (), {}, 0.0) for path in paths.values()]
    assert [str(c.block) for c in judge(history, kept, paths, SearchConfig(), last=True)] == ["2x2"]
    gap = 100 * (0.75 * 0.5 / 1.0 - 0.25 * 0.1 / 0.5)
    shown = f"{gap:+.1f} ± 0.0%"
    assert paths["4x4"].cells() == ["1.2250", shown, "2500.00", "30 + 10"] and shown in paths["4x4"].why
    assert paths["2x2"].cells() == ["0.8750", "+0.0 ± 0.0%", "1500.00", "30 + 10"] and "1.5e+03 ms" in paths["2x2"].why
    report = SearchReport("halving", "step-time", list(paths.values()), {}, BlockSize(2, 2), 1.0, 80)
    line = next(line for line in str(report).splitlines() if line.startswith("4x4"))
    assert line.split("  ")[0] == "4x4" and line.count(shown) == 2
    assert SearchReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_noise_counts_as_nothing_lost():
    noisy = {"2x2": [0.0, 2.0, 0.0, 2.0], "8x8": [2.0, 0.0, 2.0, 0.2]}
    assert judged(noisy, {"2x2": 2.0, "8x8": 1.0})[0] == ["8x8"]


def test_a_candidate_that_diverges_loses_and_if_all_do_it_is_an_error():
    bad = {"2x2": [1.0, 1.0], "4x4": [float("inf")] * 2}
    won, why = judged(bad, {"2x2": 2.0, "4x4": 1.0})
    assert won == ["2x2"] and "diverged" in why["4x4"]
    assert judged(bad, {"2x2": 2.0, "4x4": 1.0}, last=False)[0] == ["2x2"]
    with pytest.raises(KronblocksError, match="every candidate diverged"):
        judged({"2x2": [float("inf")]}, {"2x2": 1.0})


def test_divergence_is_known_by_its_kind_and_not_by_words(monkeypatch):
    step, errors = Trial.step, [Diverged("whatever it says"), KronblocksError("a batch in which the lines diverged")]

    def failing(trial, batch):
        if trial.sparsifier.step == 3 and str(trial.sparsifier.targets[0].grid.block) == "4x4":
            raise errors[0]
        return step(trial, batch)

    monkeypatch.setattr(Trial, "step", failing)
    search = SearchConfig(sizes=(2, 4), rounds=1)
    report = find_block_size(model(), CONFIG, task(), total_steps=120, search=search)
    assert {str(path.block): path.why for path in report.paths}["4x4"] == "lost: its training diverged"
    del errors[0]
    with pytest.raises(KronblocksError, match="the lines diverged"):
        find_block_size(model(), CONFIG, task(), total_steps=120, search=search)


def test_what_diverged_is_written_as_json_and_read_again():
    rung = Rung(10, math.inf, math.inf, 0.0, 0.1, 0.1)
    path = Path(BlockSize(2, 2), {"0": "2x2"}, 0.1, 0.0, [rung], why="lost: its training diverged")
    report = SearchReport("halving", "step-time", [path], {"0": "2x2"}, BlockSize(2, 2), 1.0, 10)
    assert SearchReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_batches_that_end_are_told_of():
    ended = dataclasses.replace(task(), batches=lambda seed: iter(list(itertools.islice(task().batches(seed), 3))))
    with pytest.raises(KronblocksError, match="ended after 3 batches"):
        find_block_size(model(), CONFIG, ended, total_steps=400)


SEARCHES = [find_block_size, find_block_size_in_mixture_]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"losses": lambda net, batch: (net(batch[0]) - batch[1]).square().mean()}, r'shape \(\): write reduction="none"'),
        ({"losses": lambda net, batch: (net(batch[0]) - batch[1]).square()}, r"shape \(64, 8\)"),
        ({"losses": lambda net, batch: (net(batch[0]) - batch[1]).square().mean().item()}, "a float"),
        ({"held_out": []}, "held_out has no batch"),
        ({"held_out": torch.randn(64, 32)}, r"list of batches, not Tensor: write held_out=\[batch\]"),
        ({"held_out": iter(task().held_out)}, r"or list\(batches\)"),
        ({"held_out": [tuple(part[:1] for part in task().held_out[0])]}, "at least two examples"),
    ],
)
def test_a_task_that_cannot_be_judged_is_refused_before_the_training(search, changes, says):
    def batches(seed: int):
        pytest.fail("trained")

    net = model()
    with pytest.raises(KronblocksError, match=says):
        search(net, CONFIG, dataclasses.replace(task(), batches=batches, **changes), total_steps=400)
    assert isinstance(net[0], nn.Linear)


def test_the_check_of_a_task_leaves_model_and_random_state_alone():
    net = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8).eval(), nn.Dropout())
    net[0].weight.grad = torch.ones(8, 32)
    before, state = {name: value.clone() for name, value in net.state_dict().items()}, torch.get_rng_state()
    noisy = dataclasses.replace(task(), losses=lambda net, batch: net(batch[0] + torch.rand(1)).mean(1))
    noisy.check(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net] == [True, False, True] and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones(8, 32))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_model_that_is_block_sparse_already_is_refused(search):
    net = model()
    sparsify_(net, dataclasses.replace(CONFIG, block_size=4))
    with pytest.raises(KronblocksError, match="0, 2: block-sparse already.*densify_ it"):
        search(net, CONFIG, task(), total_steps=400)


def test_too_short_a_budget_says_what_is_enough():
    short = SearchConfig(sizes=(2, 4), rounds=2, budget=1.0)
    with pytest.raises(KronblocksError, match=r"leaves 10 for each of 2 candidates in each of 2 rounds.*budget of 2 or more"):
        find_block_size(model(), CONFIG, task(), total_steps=40, search=short)
    report = find_block_size(model(), CONFIG, task(), total_steps=40, search=dataclasses.replace(short, budget=2.0))
    assert {rung.steps for path in report.paths for rung in path.rungs} == {20} and report.steps == 80


def test_a_single_candidate_needs_no_steps():
    report = find_block_size(model(), CONFIG, task(), total_steps=10, search=SearchConfig(sizes=(4,), budget=0.1))
    assert str(report.winner) == "4x4" and report.steps == 0
    short = MixtureConfig(budget=0.1)
    assert find_block_size_in_mixture_(model(), CONFIG, task(), total_steps=10, search=short, sizes=(4,)).steps == 1


@pytest.mark.parametrize(
    ("search", "settings", "steps"),
    [(find_block_size, SearchConfig(sizes=(2, 4), rounds=2), 80), (find_block_size_in_mixture_, MixtureConfig(), 67)],
)
def test_without_a_budget_a_search_before_a_short_training_is_long_enough(search, settings, steps):
    sizes = {} if isinstance(settings, SearchConfig) else {"sizes": (2, 4)}
    assert search(model(), CONFIG, task(), total_steps=40, search=settings, **sizes).steps == steps


def test_auto_says_who_searches():
    with pytest.raises(KronblocksError, match=r"find_block_size\(model, config, task"):
        sparsify_(model(), SparsityConfig(block_size="auto"))


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (SearchConfig, {"goal": "speed"}, "'step-time'"),
        (SearchConfig, {"budget": 0.0}, "budget"),
        (SearchConfig, {"rounds": 0}, "rounds"),
        (MixtureConfig, {"criterion": "norm"}, "'removal'"),
        (MixtureConfig, {"weights": "cost"}, "'time'"),
        (MixtureConfig, {"strength": 0.0}, "strength"),
        (MixtureConfig, {"growth": 0.5}, "growth"),
        (MixtureConfig, {"train_first": 1.0}, "train_first"),
    ],
)
def test_wrong_settings_say_what_to_write(kind, settings, says):
    with pytest.raises(KronblocksError, match=says):
        kind(**settings)


def test_norms_that_are_not_finite_leave_the_report_writable(monkeypatch):
    """The step after which weights overflow is not yet known to have diverged."""
    finite = Trial.norm
    monkeypatch.setattr(Trial, "norm", lambda trial: finite(trial) if trial.sparsifier.step == 0 else math.nan)
    report = find_block_size(model(), CONFIG, task(), total_steps=120, search=SearchConfig(sizes=(2, 4), rounds=1))
    assert {point["step"] for path in report.paths for point in path.history} == {0}
    json.dumps(report.to_dict(), allow_nan=False)
