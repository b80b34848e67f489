"""All candidates in one model: one is left in each layer, by what is missed without it or by the paper's penalty."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tests.search.small_task import CONFIG, convolutional, model, task
from torch import nn

from kronblocks import KronblocksError, KroneckerBlockLinear, LayerOverride, SparsityConfig, sparsify_
from kronblocks.config import RankChoice
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.ops import BlockSize
from kronblocks.search.candidates import find_candidates
from kronblocks.search.config import MixtureConfig
from kronblocks.search.mixture import _MixtureTraining, _norms, find_block_size_in_mixture_
from kronblocks.search.report import Path
from kronblocks.search.task import SearchTask

pytestmark = pytest.mark.slow


def mixed(sizes: tuple[int, ...], net: nn.Module, seconds: dict[str, float] | None = None) -> _MixtureTraining:
    """A training of candidates together, at its beginning."""
    kept = find_candidates(net, CONFIG, sizes)
    training = _MixtureTraining(net, task(), kept, MixtureConfig(weights="time"), 10)
    if seconds is not None:
        training._seconds = {name: dict.fromkeys(training._mixtures, each) for name, each in seconds.items()}
    return training


def test_candidates_together_train_with_the_whole_recipe():
    recipe = dataclasses.replace(task(), weight_decay=0.1, factor_weight_decay=0.05, factor_lr_scale=3.0, tile_lr_scale=0.5)
    training = _MixtureTraining(model(), recipe, find_candidates(model(), CONFIG, (2, 4)), MixtureConfig(), 10)
    groups = {group["name"]: group for group in training._optimizer.param_groups}
    found = {name: (group["weight_decay"], group["max_lr"] / recipe.lr) for name, group in groups.items() if group["params"]}
    assert found == {"no-decay": (0.0, 1.0), "coefficients": (0.05, 3.0), "tiles": (0.05, 1.5)}
    assert [len(groups[name]["params"]) for name in ("coefficients", "tiles")] == [4, 4]


def test_candidates_together_have_the_ranks_and_tile_groups_of_the_config():
    override = LayerOverride(rank=1, tile_groups=4)
    config = dataclasses.replace(CONFIG, rank=3, tile_groups=2, overrides={"2": override})
    training = _MixtureTraining(model(), task(), find_candidates(model(), config, (2, 4)), MixtureConfig(), 10)
    found = {
        name: [(layer.rank, layer.tile_groups) for layer in mixture._layers().values()]
        for name, mixture in training._mixtures.items()
    }
    assert found == {"0": [(3, 2), (3, 2)], "2": [(1, 4), (1, 2)]}  # 4 does not divide the 2 block rows of 4x4 blocks
    # 10%: 1,024 weights that share few tiles
    assert training._mixtures["0"].weight.detach().std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.1)


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
    with pytest.raises(KronblocksError, match=f"method '{method}' has none: use find_block_size .--criterion halving"):
        find_block_size_in_mixture_(net, SparsityConfig(method=method), task(), total_steps=400)
    assert isinstance(net[0], nn.Linear)


@pytest.mark.parametrize("changes", [{"init": "nearest"}, {"init": "nearest", "rank": RankChoice(max_error=0.1)}])
def test_candidates_together_refuse_to_start_from_the_present_weights(changes):
    with pytest.raises(KronblocksError, match="begin from new factors, but init='nearest'"):
        find_block_size_in_mixture_(model(), dataclasses.replace(CONFIG, **changes), task(), total_steps=400)


def test_of_candidates_that_do_harm_the_one_that_takes_longer_goes_first(monkeypatch):
    training = mixed((2, 4, 8), model(), {"2x2": 4.0, "4x4": 1.0, "8x8": 1.0})
    missed = {"2x2": -0.1, "4x4": -0.2, "8x8": 0.5}
    whole = float(training._task.judge(training._model).mean())
    monkeypatch.setattr(training, "_without", lambda scope, name: whole + missed[name])
    paths = {name: Path(BlockSize.parse(name), {}, 1.0, 0.0) for name in missed}
    training._remove_worst(1, paths)
    assert {name for mixture in training._mixtures.values() for name in mixture.candidates} == {"4x4", "8x8"}


def test_candidates_are_weighed_by_their_time_in_the_layers_that_are_judged():
    training = mixed((16, 32), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 6)))  # 2x16 and 2x32 in the second
    time = {name: dict(layers) for name, layers in training._seconds.items()}
    for scope in (["0"], ["1"], ["0", "1"]):
        spent = {name: sum(layers[layer] for layer in scope) for name, layers in time.items()}
        weights = training._weights(scope)
        assert weights["16x16"] / weights["32x32"] == pytest.approx(spent["16x16"] / spent["32x32"])
        assert sum(weights.values()) == pytest.approx(2)
    training._seconds = {"16x16": {"0": 3.0, "1": 1.0}, "32x32": {"0": 1.0, "1": 1.0}}
    assert training._weights(["1"]) == {"16x16": 1.0, "32x32": 1.0}
    assert training._weights(["0", "1"])["16x16"] == pytest.approx(4 / 3)


def test_candidates_that_fit_other_layers_meet_where_all_fit():
    training = mixed((5, 4), nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 20), nn.Linear(20, 16)))
    assert {name: list(mixture.candidates) for name, mixture in training._mixtures.items()} == {
        **{"1": ["4x4", "5x5"], "2": ["4x4", "5x5"]},
    }
    with pytest.raises(KronblocksError, match="no layer fits all candidates"):
        mixed((5, 4), nn.Sequential(nn.Linear(35, 5), nn.Linear(9, 32)))


@pytest.mark.parametrize("criterion", ["removal", "penalty"])
def test_too_few_steps_between_removals_say_what_is_enough(criterion):
    net, tried = model(), {"sizes": (2, 4, 8)}
    short = MixtureConfig(criterion=criterion, budget=0.01)
    says = r"0\.01 of 200 steps leaves 0 for each of 2 removals, but 20 are needed: give a budget of 0\.5 or more"
    with pytest.raises(KronblocksError, match=says):
        find_block_size_in_mixture_(net, CONFIG, task(), total_steps=200, search=short, **tried)
    assert isinstance(net[0], nn.Linear)
    enough = MixtureConfig(criterion=criterion, budget=0.5, train_first=0.4)
    with pytest.raises(KronblocksError, match="leaves 19"):
        find_block_size_in_mixture_(net, CONFIG, task(), total_steps=196, search=enough, **tried)
    report = find_block_size_in_mixture_(net, CONFIG, task(), total_steps=200, search=enough, **tried)
    assert all("when the steps were over" not in path.why for path in report.paths)


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


def test_frozen_layers_stay_frozen_and_every_module_in_its_mode():
    net = nn.Sequential(*convolutional(), nn.Dropout(0.1)).eval()
    net[4].train()
    net[3].weight.requires_grad_(False)
    config, modes = dataclasses.replace(CONFIG, convolutions=True, frozen="sparsify", init="random"), []
    watched = dataclasses.replace(task(), losses=lambda net, batch: (modes.append(net.training), task().losses(net, batch))[1])
    find_block_size_in_mixture_(net, config, watched, total_steps=200, sizes=(2, 4))
    assert isinstance(net[3], KroneckerBlockLinear) and isinstance(net[1].linear, KroneckerBlockLinear)
    assert {name: p.requires_grad for name, p in net[3].named_parameters()} == {"coeff": False, "tiles": False, "bias": True}
    assert all(p.requires_grad for p in net[1].parameters())
    assert [name for name, module in net.named_modules() if module.training] == ["4"]
    assert {True, False} == set(modes)  # trained in the one, judged in the other


def test_a_training_that_diverges_leaves_the_modes_too():
    net = model().eval()
    bad = dataclasses.replace(task(), losses=lambda net, batch: task().losses(net, batch) * (torch.nan if net.training else 1))
    with pytest.raises(KronblocksError, match="diverged"):
        find_block_size_in_mixture_(net, CONFIG, bad, total_steps=200, sizes=(2, 4))
    assert not any(module.training for module in net.modules())


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


def test_convolutions_become_mixtures_over_patches_and_train_on():
    net, config = convolutional(), dataclasses.replace(CONFIG, convolutions=True)
    report = find_block_size_in_mixture_(net, config, task(), total_steps=200, sizes=(2, 4))
    assert isinstance(net[1], UnfoldedConv) and isinstance(net[1].linear, KroneckerBlockLinear)
    assert set(report.chosen) == {"1.linear", "3"}
    factors = net[1].linear.coeff
    sparsifier = sparsify_(net, report.config(config))
    assert net[1].linear.coeff is factors and [target.name for target in sparsifier.targets] == ["1.linear", "3"]
