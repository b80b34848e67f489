"""Searches find the size that a task is made for, and say why the others lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
from torch import nn

from kronblocks import BlockSize, KronblocksError, KroneckerBlockLinear, LayerOverride, RankChoice, SparsityConfig, sparsify_
from kronblocks.search.candidates import Candidate, find_candidates
from kronblocks.search.halving import SearchConfig, _judge, _note, _Result, find_block_size, standings
from kronblocks.search.mixture import MixtureConfig, _MixtureTraining, _norms, find_block_size_in_mixture_
from kronblocks.search.report import Path, Rung, SearchReport
from kronblocks.search.task import SearchTask, Trial

CONFIG = SparsityConfig(rank=2, target_sparsity=0.75)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8))


def task(lr: float = 1e-2) -> SearchTask:
    teacher = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))

    def batches(seed: int):
        generator = torch.Generator().manual_seed(seed)
        for _ in itertools.count():
            x = torch.randn(16, 32, generator=generator)
            yield x, x @ teacher.t()

    held = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    return SearchTask(
        batches, [(held, held @ teacher.t())], lambda net, batch: (net(batch[0]) - batch[1]).square().mean(1), lr=lr
    )


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


def test_a_trial_takes_the_whole_recipe():
    recipe = dataclasses.replace(task(), weight_decay=0.1, factor_weight_decay=0.05, factor_lr_scale=2.0, lifted_lr_scale=3.0)
    groups = {group["name"]: group for group in Trial(model(), CONFIG, recipe, 40, seed=0)._optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        **{"dense": 0.1, "no-decay": 0.0, "factors": 0.05, "lifted": 0.05},
    }
    recipe = dataclasses.replace(recipe, lifted_weight_decay=0.2)
    assert Trial(model(), CONFIG, recipe, 40, seed=0)._optimizer.param_groups[-1]["weight_decay"] == 0.2
    assert [groups[name]["max_lr"] / groups["dense"]["max_lr"] for name in ("factors", "lifted")] == [2.0, 3.0]


def mixed(sizes: tuple[int, ...], net: nn.Module, seconds: dict[str, float] | None = None) -> _MixtureTraining:
    """A training of candidates together, at its beginning."""
    kept = find_candidates(net, CONFIG, sizes)
    training = _MixtureTraining(net, task(), kept, MixtureConfig(weights="time"), 10)
    training._seconds = seconds or training._seconds
    return training


def test_candidates_together_train_with_the_whole_recipe():
    recipe = dataclasses.replace(task(), weight_decay=0.1, factor_weight_decay=0.05, factor_lr_scale=3.0)
    training = _MixtureTraining(model(), recipe, find_candidates(model(), CONFIG, (2, 4)), MixtureConfig(), 10)
    groups = {group["name"]: group for group in training._optimizer.param_groups}
    found = {name: (group["weight_decay"], group["max_lr"] / recipe.lr) for name, group in groups.items() if group["params"]}
    assert found == {"no-decay": (0.0, 1.0), "factors": (0.05, 3.0)}
    assert len(groups["factors"]["params"]) == 8


def test_candidates_together_have_the_ranks_and_tile_groups_of_the_config():
    override = LayerOverride(rank=1, tile_groups=4)
    config = dataclasses.replace(CONFIG, rank=3, tile_groups=2, overrides={"2": override})
    training = _MixtureTraining(model(), task(), find_candidates(model(), config, (2, 4)), MixtureConfig(), 10)
    found = {
        name: [(layer.rank, layer.tile_groups) for layer in mixture._layers().values()]
        for name, mixture in training._mixtures.items()
    }
    assert found == {"0": [(3, 2), (3, 2)], "2": [(1, 4), (1, 2)]}  # 4 does not divide the 2 block rows of 4x4 blocks
    weight = sum(layer.dense_weight() for layer in training._mixtures["0"]._layers().values())
    # 10%: 1,024 weights that share few tiles
    assert weight.detach().std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"rank": None}, 4),
        ({"rank": None, "overrides": {"*": LayerOverride(rank=1)}}, 1),
        ({"method": "kron-l1", "rank": 2}, 2),
    ],
)
def test_what_candidates_together_become_is_what_the_config_says(changes, rank):
    config, net = dataclasses.replace(CONFIG, **changes), model()
    report = find_block_size_in_mixture_(
        net, config, task(), total_steps=400, sizes=(4, "4x2"), search=MixtureConfig(weights="equal")
    )
    assert report.winner is not None
    areas = {"4x4": 16, "4x2": 8}
    assert net[0].rank == min(rank, areas[str(report.winner)])
    assert net[0].tile_groups == (1 if config.method == "kron-l1" else net[0].grid.shape[0])
    assert sparsify_(net, report.config(config)).targets


@pytest.mark.parametrize("method", ["magnitude", "rigl", "group-lasso", "dense"])
def test_methods_without_factors_are_not_judged_by_factors(method):
    net = model()
    with pytest.raises(KronblocksError, match=f"method '{method}' has none: take find_block_size .--criterion halving"):
        find_block_size_in_mixture_(net, SparsityConfig(method=method), task(), total_steps=400)
    assert isinstance(net[0], nn.Linear)


@pytest.mark.parametrize("changes", [{"init": "nearest"}, {"init": "nearest", "rank": RankChoice(max_error=0.1)}])
def test_candidates_together_refuse_to_start_from_the_present_weights(changes):
    with pytest.raises(KronblocksError, match="begin anew, and init='nearest'"):
        find_block_size_in_mixture_(model(), dataclasses.replace(CONFIG, **changes), task(), total_steps=400)


def test_of_candidates_that_do_harm_the_one_that_takes_longer_goes_first(monkeypatch):
    training = mixed((2, 4, 8), model(), {"2x2": 4.0, "4x4": 1.0, "8x8": 1.0})
    missed = {"2x2": -0.1, "4x4": -0.2, "8x8": 0.5}
    whole = float(training._task.judge(training._model).mean())
    monkeypatch.setattr(training, "_without", lambda scope, name: whole + missed[name])
    paths = {name: Path(BlockSize.parse(name), {}, 1.0, 0.0) for name in missed}
    training._remove_worst(1, paths)
    assert {name for mixture in training._mixtures.values() for name in mixture.candidates} == {"4x4", "8x8"}


def test_candidates_that_fit_other_layers_meet_where_all_fit():
    training = mixed((5, 4), nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 20), nn.Linear(20, 16)))
    assert {name: list(mixture.candidates) for name, mixture in training._mixtures.items()} == {
        **{"1": ["4x4", "5x5"], "2": ["4x4", "5x5"]},
    }
    with pytest.raises(KronblocksError, match="no layer is fit by all candidates"):
        mixed((5, 4), nn.Sequential(nn.Linear(35, 5), nn.Linear(9, 32)))


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


def judged(losses: dict[str, list[float]], costs: dict[str, float], **settings):
    """Who goes on after one round, and why the others do not."""
    history = [results(losses, costs)]
    kept = [Candidate(BlockSize.parse(name), (), 0.0, 0.0) for name in losses]
    paths = {name: Path(BlockSize.parse(name), {}, 0.0, 0.0) for name in losses}
    last = settings.pop("last", True)
    _note(history[0], paths, 50)
    winners = _judge(history, kept, paths, SearchConfig(**settings), last=last)
    return [str(c.block) for c in winners], {name: path.why for name, path in paths.items()}


def results(losses: dict[str, list[float]], costs: dict[str, float], steps: int = 50) -> dict[str, _Result]:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}
    return {name: _Result(tensor, costs[name], costs[name], steps) for name, tensor in tensors.items()}


LOSSES = {"2x2": [1.0, 1.0, 1.0, 1.0], "4x4": [1.004, 1.004, 1.004, 1.004], "8x8": [1.5, 1.5, 1.5, 1.5]}
COSTS = {"2x2": 3.0, "4x4": 2.0, "8x8": 1.0}


def test_the_cheapest_that_loses_nothing_wins_and_accuracy_can_be_asked_for():
    won, why = judged(LOSSES, COSTS)
    assert won == ["4x4"] and "4x4 takes 2e+03 ms and not 3e+03 ms" in why["2x2"] and "more than 2%" in why["8x8"]
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


def test_the_table_shows_the_means_that_decided():
    """4x4 is the worse one over all rounds and the better one in the last."""
    history = [
        results({"2x2": [1.0, 1.0], "4x4": [1.5, 1.5]}, {"2x2": 1.0, "4x4": 2.0}, steps=30),
        results({"2x2": [0.5, 0.5], "4x4": [0.4, 0.4]}, {"2x2": 3.0, "4x4": 4.0}, steps=10),
    ]
    paths = {name: Path(BlockSize.parse(name), {}, 0.0, 0.0) for name in ("2x2", "4x4")}
    for each, steps in zip(history, (30, 10), strict=True):
        _note(each, paths, steps)
    kept = [Candidate(path.block, (), 0.0, 0.0) for path in paths.values()]
    assert [str(c.block) for c in _judge(history, kept, paths, SearchConfig(), last=True)] == ["2x2"]
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


def test_what_diverged_is_written_as_json_and_read_again():
    rung = Rung(10, math.inf, math.inf, 0.0, 0.1, 0.1)
    path = Path(BlockSize(2, 2), {"0": "2x2"}, 0.1, 0.0, [rung], why="lost: its training diverged")
    report = SearchReport("halving", "step-time", [path], {"0": "2x2"}, BlockSize(2, 2), 1.0, 10)
    assert SearchReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_batches_that_end_are_told_of():
    ended = dataclasses.replace(task(), batches=lambda seed: iter(list(itertools.islice(task().batches(seed), 3))))
    with pytest.raises(KronblocksError, match="ended after 3 batches"):
        find_block_size(model(), CONFIG, ended, total_steps=400)


@pytest.mark.parametrize("criterion", ["removal", "penalty"])
def test_too_few_steps_between_removals_say_so(criterion):
    net, tried = model(), {"sizes": (2, 4, 8)}
    short = MixtureConfig(criterion=criterion, budget=0.01)
    with pytest.raises(KronblocksError, match=r"0\.01 of 200 steps leaves 0 .*2 removals.*20 are needed: give a larger"):
        find_block_size_in_mixture_(net, CONFIG, task(), total_steps=200, search=short, **tried)
    assert isinstance(net[0], nn.Linear)
    enough = MixtureConfig(criterion=criterion, budget=0.5, train_first=0.4)
    with pytest.raises(KronblocksError, match="leaves 19"):
        find_block_size_in_mixture_(net, CONFIG, task(), total_steps=196, search=enough, **tried)
    report = find_block_size_in_mixture_(net, CONFIG, task(), total_steps=200, search=enough, **tried)
    assert all("when the steps were over" not in path.why for path in report.paths)


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


def test_too_short_a_budget_says_so():
    with pytest.raises(KronblocksError, match="larger budget"):
        find_block_size(model(), CONFIG, task(), total_steps=40)


@pytest.mark.parametrize("criterion", ["removal", "penalty"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_mixtures_leave_one_candidate_in_each_layer_and_train_on(criterion, per_layer):
    net = model()
    report = find_block_size_in_mixture_(
        net,
        CONFIG,
        task(),
        total_steps=200,
        search=MixtureConfig(criterion=criterion, per_layer=per_layer, strength=3.0),
        sizes=(2, 4, 8),
    )
    assert isinstance(net[0], KroneckerBlockLinear) and isinstance(net[2], KroneckerBlockLinear)
    assert report.chosen == {"0": str(net[0].grid.block), "2": str(net[2].grid.block)}
    assert per_layer or report.winner is not None
    lost = [path for path in report.paths if "lost" in path.why]
    assert all(path.why for path in report.paths) and (per_layer or len(lost) == 2)
    assert all({"step", "norm"} == set(point) for path in report.paths for point in path.history)
    factors = net[0].coeff
    sparsifier = sparsify_(net, report.config(CONFIG))
    assert net[0].coeff is factors  # trained on, not begun anew
    assert [target.name for target in sparsifier.targets] == ["0", "2"]


@pytest.mark.parametrize("steps", [200, 1600])
@pytest.mark.parametrize("weights", ["time", "equal"])
def test_the_penalty_shrinks_all_candidates_but_one_to_zero(steps, weights):
    net = model()
    search = MixtureConfig(criterion="penalty", weights=weights)
    report = find_block_size_in_mixture_(net, CONFIG, task(), total_steps=steps, search=search, sizes=(2, 4, 8))
    assert report.goal == ("norm per unit of time" if weights == "time" else "norm")  # no held-out loss
    whys = [path.why for path in report.paths]
    assert whys.count("won") == 1
    assert all(why == "won" or why.startswith("lost: its norm was shrunk to 0 at step") for why in whys), whys
    assert all(layer.dense_weight().norm().item() > 0.1 for layer in net if isinstance(layer, KroneckerBlockLinear))


def test_a_weak_penalty_says_that_it_left_several():
    search = MixtureConfig(criterion="penalty", strength=1e-3)
    report = find_block_size_in_mixture_(model(), CONFIG, task(), total_steps=200, search=search, sizes=(2, 4, 8))
    assert sum("of least norm" in path.why for path in report.paths) == 2


def test_where_the_penalty_would_take_all_candidates_at_once_one_stays_as_it_is():
    training = mixed((2, 4, 8), model(), dict.fromkeys(("2x2", "4x4", "8x8"), 1.0))
    training._search = MixtureConfig(criterion="penalty", strength=1e6)
    before = _norms(training._mixtures)
    training._shrink(5, 4, {name: Path(BlockSize.parse(name), {}, 1.0, 0.0) for name in before})
    best = max(before, key=before.__getitem__)
    assert _norms(training._mixtures) == {best: pytest.approx(before[best])}


def test_the_removal_criterion_keeps_what_the_task_is_made_of():
    """The target is a Kronecker product of 8x8 blocks: without those the loss is large, without the others it is not."""
    torch.manual_seed(0)
    teacher = torch.kron(torch.randn(4, 4), torch.randn(8, 8))

    def batches(seed: int):
        generator = torch.Generator().manual_seed(seed)
        for _ in itertools.count():
            x = torch.randn(32, 32, generator=generator)
            yield x, x @ teacher.t()

    held = torch.randn(128, 32)
    made = SearchTask(batches, [(held, held @ teacher.t())], lambda net, b: (net(b[0]) - b[1]).square().mean(1), lr=2e-2)
    net = nn.Sequential(nn.Linear(32, 32, bias=False))
    search = MixtureConfig(weights="equal", train_first=0.5)
    config = SparsityConfig(rank=1, tile_groups=1)
    report = find_block_size_in_mixture_(net, config, made, total_steps=1200, search=search, sizes=(2, 8, 16))
    assert report.goal == "held-out loss"
    assert str(report.winner) == "8x8"


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
