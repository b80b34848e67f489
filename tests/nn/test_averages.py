"""Averages of states: what holds equal patterns is mended and followed, what holds different ones is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from kronblocks import BlockSparseLinear, KronblocksError, SparsityConfig, from_pretrained, save_pretrained, sparsify_
from kronblocks.nn.base import BlockLayer

pytestmark = pytest.mark.usefixtures("compiles_afresh")

METHODS = {
    "static": {"method": "static"},
    "rigl": {"method": "rigl", "target_sparsity": 0.75},
    "magnitude": {"method": "magnitude", "storage": "packed", "target_sparsity": 0.75},
}


def train(method: dict, steps: int, watch) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    sparsifier = sparsify_(model, SparsityConfig(block_size=8, **method))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=steps)
    for _ in range(steps):
        x = torch.randn(16, 64)
        loss = (model(x) - x[:, :16].sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch(model, sparsifier)
    return model


def assert_consistent(model: nn.Sequential, expected_weight) -> None:
    for layer in model:
        if isinstance(layer, BlockLayer):
            y = layer(x := torch.randn(5, layer.in_features))  # first, since positions are mended when they are used
            wanted = nn.functional.linear(x, expected_weight(layer), layer.bias)
            torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)  # sums of at most 1024 products of size 1/32


def timm_ema(average: nn.Module, model: nn.Module, decay: float = 0.9) -> None:
    """As timm's ModelEma: over the state_dict, whatever it holds."""
    with torch.no_grad():
        state = model.state_dict()
        for name, value in average.state_dict().items():
            value.copy_(value * decay + (1 - decay) * state[name])


@pytest.mark.parametrize("method", METHODS)
def test_an_average_that_follows_the_buffers(method, expected_weight):
    """torch's average without use_buffers copies them."""
    averages = []

    def watch(model, sparsifier):
        if method != "magnitude" or sparsifier.phase == "heal":  # where healing starts, dead slots go
            if not averages:
                averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
            averages[0].update_parameters(model)

    train(METHODS[method], 60, watch)
    assert_consistent(averages[0].module, expected_weight)


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9995, 0.9999, 0.99999])
def test_positions_survive_an_average_of_themselves(decay, expected_weight, tmp_path):
    """Averaged through float32 and cut, numbers of blocks fall by one, and by more as steps go by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 64))
    sparsify_(model, SparsityConfig(method="static", block_size=8, target_sparsity=0.5))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(200):
        average.update_parameters(model)
    averaged: Any = average.module
    damaged = averaged[0].block_position.clone()
    assert not torch.equal(damaged, model[0].block_position), "so there is something to mend"
    folder = save_pretrained(averaged, tmp_path / "average")
    assert torch.equal(averaged[0].block_position, model[0].block_position)
    averaged[0].block_position.copy_(damaged)
    assert torch.equal(averaged.state_dict()["0.block_position"], model[0].block_position)
    averaged[0].block_position.copy_(damaged)
    assert_consistent(averaged, expected_weight)
    again = from_pretrained(folder, lambda: nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 64)))
    x = torch.randn(3, 1024)
    torch.testing.assert_close(again(x), averaged(x))


@pytest.mark.parametrize("plan", ["packed", "dense"])
def test_compiled_code_mends_them_too(plan):
    layer = BlockSparseLinear(64, 64, 4, mask=torch.rand(16, 16) < 0.5, plan=plan)
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    compiled = torch.compile(average.module, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        average.update_parameters(layer)
    assert not torch.equal(average.module.block_position, layer.block_position)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_slots_of_dead_blocks_do_not_hide_a_damage():
    """Cut positions may give each live block a slot by chance: the slot of a dead one."""
    mask = torch.tensor([[True, True, False, True]])
    layer = BlockSparseLinear(8, 2, 2, mask=torch.ones(1, 4, dtype=torch.bool))
    layer.set_block_mask_(mask)
    weight = layer.dense_weight().detach()
    assert layer.block_position.tolist() == [0, 1, 2, 3]
    with torch.no_grad():
        layer.block_position.copy_(torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(layer.dense_weight().detach(), weight)
    layer = BlockSparseLinear(8, 2, 2, mask=torch.tensor([[False, False, True, True]]))
    layer.set_block_mask_(torch.tensor([[False, False, True, False]]))
    weight = layer.dense_weight().detach()
    with torch.no_grad():
        layer.block_position.copy_(torch.tensor([1, 2]))
    torch.testing.assert_close(layer.dense_weight().detach(), weight)
    source = BlockSparseLinear(8, 2, 2, mask=torch.tensor([[False, True, True, False]]))
    source.set_block_mask_(torch.tensor([[False, False, True, False]]))
    with torch.no_grad():
        for name, value in layer.state_dict().items():
            value.copy_(source.state_dict()[name])
    assert layer.block_position.tolist() == [1, 2]
    torch.testing.assert_close(layer.dense_weight(), source.dense_weight())


def test_timms_average_in_a_training(expected_weight):
    averages = []

    def watch(model, sparsifier):
        if sparsifier.phase == "heal":
            if not averages:
                averages.append(copy.deepcopy(model))
            timm_ema(averages[0], model)

    model = train({"target_sparsity": 0.75}, 60, watch)
    assert_consistent(averages[0], expected_weight)
    assert all(torch.equal(one.block_position, two.block_position) for one, two in zip(averages[0][::2], model[::2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["call", "compiled", "dense compiled", "save", "state_dict", "mask"])
def test_an_average_of_two_patterns_is_refused(how, tmp_path):
    plan = "dense" if "dense" in how else "packed"
    one, two = (BlockSparseLinear(32, 32, 4, mask=torch.rand(8, 8) < 0.5, plan=plan) for _ in range(2))
    live = min(one.capacity, two.capacity)
    one, two = (
        BlockSparseLinear.from_dense(layer, block_size=4, mask=mask, plan=plan)  # pyright: ignore[reportArgumentType]
        for layer, mask in (
            (each, torch.zeros(64, dtype=torch.bool).index_fill(0, each.block_position[:live], True).view(8, 8))
            for each in (one, two)
        )
    )
    compiled = torch.compile(one, backend="aot_eager")
    compiled(torch.randn(2, 32))
    with torch.no_grad():
        for name, value in one.state_dict().items():
            value.copy_((value + two.state_dict()[name]) / 2)
    model = nn.Sequential(one)
    calls = {
        "call": lambda: one(torch.randn(2, 32)),
        "compiled": lambda: compiled(torch.randn(2, 32)),
        "dense compiled": lambda: compiled(torch.randn(2, 32)),
        "save": lambda: save_pretrained(model, tmp_path / "average"),
        "state_dict": model.state_dict,
        "mask": lambda: one.set_block_mask_(two.block_mask),
    }
    error = (
        (KronblocksError, RuntimeError) if how == "compiled" else KronblocksError
    )  # from C++ the same words come as the latter
    with pytest.raises(error, match="layers with different live blocks were averaged"):
        calls[how]()


def test_an_average_with_buffers_over_regrowth_is_refused():
    """Its mask is the union, for which there are not slots enough."""
    averages = []

    def watch(model, _):
        if not averages:
            averages.append(AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True))
        averages[0].update_parameters(model)

    train(METHODS["rigl"], 40, watch)
    with pytest.raises(KronblocksError, match="different live blocks were averaged"):
        averages[0].module(torch.randn(2, 64))


def test_a_soup_of_masks_of_one_pattern_that_loses_blocks_is_their_union(expected_weight):
    layer = BlockSparseLinear(16, 16, 4, plan="packed")
    average = copy.deepcopy(layer)
    layer.set_block_mask_(torch.eye(4, dtype=torch.bool))
    timm_ema(average, layer)
    assert average.density == 1
    assert_consistent(nn.Sequential(average), expected_weight)
    assert torch.equal(average.block_position, layer.block_position)


def test_an_average_with_use_buffers_by_swa_is_torchs_own_error():
    """docs/limits.md says so: the equal average divides whole numbers, also those of nn.BatchNorm1d."""
    for layer in (BlockSparseLinear(8, 8, 4), nn.BatchNorm1d(4)):
        average = AveragedModel(layer, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True)
        average.update_parameters(layer)
        with pytest.raises(RuntimeError, match="Integer division"):
            average.update_parameters(layer)
