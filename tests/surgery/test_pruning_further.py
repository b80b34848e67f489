"""Models that are block-sparse already and are pruned further: from their own live blocks, nothing revived, exact in the end."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from tests.helpers import METHODS, STEPS, attached, config, loss_of, mlp, run, same
from torch import Tensor, nn

from kronblocks import (
    KronblocksError,
    KronblocksWarning,
    SparsityConfig,
    densify_,
    from_pretrained,
    save_pretrained,
    sparsify_,
)
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.methods import spec_of
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery import select


def train(model: nn.Module, sparsifier: Sparsifier, until: int = STEPS) -> list[list[Tensor]]:
    """The masks before, and after every step."""
    optimizer = attached(model, sparsifier)
    masks = [[target.mask.clone() for target in sparsifier.targets]]
    for step in range(sparsifier.step, until):
        optimizer.zero_grad()
        (loss_of(model, step) + sparsifier.penalty()).backward()
        optimizer.step()
        masks.append([target.mask.clone() for target in sparsifier.targets])
    return masks


def sparse(method: str = "magnitude") -> nn.Sequential:
    """A model that a training has left 60% sparse, in block layers."""
    model = mlp()
    train(
        model, sparsify_(model, config(method, target_sparsity=0.6, **({"storage": "packed"} if method == "magnitude" else {})))
    )
    return model


def weights(model: nn.Sequential) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in model if hasattr(layer, "weight")]  # pyright: ignore[reportCallIssue]


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("first", ["magnitude", "kron-l1"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_the_live_blocks(method, first, saved, tmp_path):
    model = sparse(first)
    if saved:
        model = from_pretrained(save_pretrained(model, tmp_path / "model"), mlp)
        assert isinstance(model, nn.Sequential)
    before, kept = weights(model), [layer.block_mask.clone() for layer in model if isinstance(layer, BlockLayer)]
    sparsifier = sparsify_(model, config(method, target_sparsity=0.85))
    for old, new, mask in zip(before, weights(model), kept, strict=True):
        if not spec_of(method).draws_start:
            assert torch.equal(old, new)
        assert not ((new != 0) & (old == 0)).any() and mask.any()
    masks = train(model, sparsifier)
    total = sum(mask.numel() for mask in kept)
    share = [1 - sum(int(mask.sum()) for mask in each) / total for each in masks]
    assert sparsifier.report().live_blocks == total - -(-85 * total // 100)  # ceil of 85% are dead
    if spec_of(method).starts_sparse:
        assert share[0] == share[-1]
    else:
        assert share[0] == 1 - sum(int(mask.sum()) for mask in kept) / total
    if method != "rigl":  # which brings back others than those that it drops
        for earlier, later in itertools.pairwise(masks):
            assert not any((new & ~old).any() for new, old in zip(later, earlier, strict=True))
        assert share == sorted(share)


@pytest.mark.parametrize(
    ("shape", "middle"), [("cubic", 0.6 + 0.3 * 7 / 8), ("linear", 0.75), ("staircase", 1 - 0.4 * 0.25**0.4)]
)
def test_the_schedule_begins_at_the_present_sparsity(shape, middle):
    schedule = SparsitySchedule(0.9, 1000, start=0.1, end=0.5, shape=shape, initial_sparsity=0.6)
    assert [schedule.sparsity_at(step) for step in (0, 100, 500)] == pytest.approx([0.6, 0.6, 0.9])
    assert schedule.sparsity_at(300) == pytest.approx(middle)


def test_pruning_begins_where_the_schedule_says_and_not_late():
    """From 0 the schedule would pass the present sparsity only after a third of its span, and kill nothing before."""
    sparsifier = sparsify_(model := sparse(), config("magnitude", target_sparsity=0.9))
    masks = train(model, sparsifier)
    assert sparsifier.schedule is not None
    dead = [sum(int((~mask).sum()) for mask in each) for each in masks]
    first = sparsifier.schedule.next_update(sparsifier.schedule.start_step)
    assert dead[first - 1] == dead[0] < dead[first]


@pytest.mark.parametrize("init", ["nearest", "random", "spectral"])
def test_factors_keep_the_mask_and_start_from_the_live_blocks(init):
    model = sparse()
    before, masks = weights(model), [layer.block_mask.clone() for layer in model if isinstance(layer, BlockSparseLinear)]
    report = sparsify_(model, config("two-phase", target_sparsity=0.85, init=None if init == "nearest" else init)).surgery
    for old, new, mask, each in zip(before, weights(model), masks, report.selected, strict=True):
        assert torch.equal(each.grid.norms(new) > 0, mask)
        error = float((new - old).norm() / old.norm())
        assert (error < 0.95) == (init != "random")
        assert new.square().mean() == pytest.approx(float(old.square().mean()), rel=1e-4) or init == "nearest"
        assert (each.error is not None) == (init == "nearest") and (
            each.error is None or each.error == pytest.approx(error, rel=1e-4)
        )


@pytest.mark.parametrize("method", ["rigl", "static"])
def test_sparse_starts_keep_the_strongest_of_their_own_blocks(method):
    model = sparse()
    norms = [layer.block_norms() for layer in model if isinstance(layer, BlockLayer)]
    sparsify_(model, config(method, target_sparsity=0.85))
    for layer, norm in zip((model[0], model[2]), norms, strict=False):  # the last one keeps a block in every row
        assert isinstance(layer, BlockSparseLinear) and layer.capacity == int(layer.block_mask.sum())
        assert norm[layer.block_mask].min() >= norm[~layer.block_mask].max()
    random = sparse()
    sparsify_(random, config(method, target_sparsity=0.85, init="random"))
    assert not torch.equal(random[2].block_mask, model[2].block_mask)
    assert not (random[2].block_mask & (norms[1] == 0)).any()


def test_targets_below_the_present_sparsity_are_refused_and_the_present_one_is_not():
    model = sparse()
    kinds, before = [type(layer) for layer in model], weights(model)
    for method in METHODS:
        with pytest.raises(KronblocksError, match=r"60\.\d% of the weights of the selected layers \(0, 2, 4\) .*call densify_"):
            sparsify_(model, config(method, target_sparsity=0.5))
    assert [type(layer) for layer in model] == kinds and same(weights(model), before)
    with torch.no_grad():
        model[0].set_block_mask_(torch.eye(8, 4, dtype=torch.bool))
    with pytest.raises(KronblocksError, match=r"87.5% of the weights of 0 .*target_sparsity=0.7"):
        sparsify_(model, config("magnitude", target_sparsity=0.7, scope="layer"))
    # ceil of 60% of the blocks are dead, a little more than 60%
    sparsifier = sparsify_(sparse(), config("magnitude", target_sparsity=0.6))
    train(sparsifier.model, sparsifier)
    assert sparsifier.report().live_blocks == int(0.4 * sparsifier.report().total_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [5, 12, 25])
@pytest.mark.parametrize("method", ["two-phase", "magnitude", "group-lasso"])
def test_such_a_training_can_be_resumed(method, stop, tmp_path):
    folder = save_pretrained(sparse(), tmp_path / "model")

    def start() -> tuple[nn.Module, Sparsifier]:
        model = from_pretrained(folder, mlp)
        return model, sparsify_(model, config(method, target_sparsity=0.85, measure_plans=False))

    model, sparsifier = start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=STEPS)

    run(model, sparsifier, optimizer, until=stop)
    state, values = sparsifier.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    run(model, sparsifier, optimizer, until=STEPS)
    again, resumed = start()
    resumed.load_state_dict(state)
    again.load_state_dict(values)
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed.attach(optimizer, total_steps=STEPS)
    run(again, resumed, optimizer, until=STEPS)
    assert same(model.state_dict(), again.state_dict())
    assert resumed.initial_sparsity == sparsifier.initial_sparsity > 0.6


def test_plain_and_block_layers_share_one_budget():
    model = sparse()
    model.add_module("5", nn.Tanh())
    model.add_module("6", nn.Linear(16, 16))
    sparsifier = sparsify_(model, config("magnitude", target_sparsity=0.75, storage="packed"))
    train(model, sparsifier)
    report = sparsifier.report()
    assert [layer.name for layer in report.layers] == ["0", "2", "4", "6"]
    assert report.total_blocks - report.live_blocks == -(-3 * report.total_blocks // 4)


def test_convolutions_that_are_sparse_already(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 16))

    def prune(model: nn.Module, target: float, **settings) -> Sparsifier:
        sparsifier = sparsify_(model, SparsityConfig("magnitude", 4, target_sparsity=target, **settings))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sparsifier.attach(optimizer, total_steps=STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 6, 6)).square().mean().backward()
            optimizer.step()
        return sparsifier

    model = make()
    prune(model, 0.5, convolutions=True, storage="packed")
    again = from_pretrained(save_pretrained(model, tmp_path / "model"), make)
    report = prune(again, 0.8).report()
    assert [layer.name for layer in report.layers] == ["0.linear", "2.linear", "4"]
    assert report.total_blocks - report.live_blocks == -(-4 * report.total_blocks // 5)


def test_plain_layers_that_have_lost_blocks_are_warned_of():
    model = sparse()
    densify_(model)
    with pytest.warns(KronblocksWarning, match=r"blocks of 0 are exactly zero; .*will train.*do not densify_"):
        sparsify_(model, config("magnitude", target_sparsity=0.85))
    fresh = mlp()
    nn.init.zeros_(fresh[4].weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify_(fresh, config("magnitude", target_sparsity=0.85))


def test_the_report_says_so_and_storage_dense_gives_plain_layers():
    model = sparse("kron-l1")
    assert all("already" in each.note for each in select(model, config("magnitude", target_sparsity=0.85)).selected)
    mask = model[0].block_mask.clone()
    sparsifier = sparsify_(model, config("magnitude", target_sparsity=0.85, storage="dense"))
    assert type(model[0]) is nn.Linear and torch.equal(sparsifier.targets[0].mask, mask)
    assert isinstance(sparse("kron-l1")[0], KroneckerBlockLinear)
