"""Early weights under the masks of now: exact where blocks live, zero elsewhere, and training goes on with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.helpers import STEPS, attached, config, run, same
from torch import Tensor, nn

from kronblocks import KronblocksError, SparsityConfig, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.nn.base import BlockLayer
from kronblocks.surgery import lift_, rewind_


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16))


def copy_of(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def dense_weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().clone() for layer in model.modules() if isinstance(layer, nn.Linear | BlockLayer)]


def train(model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, steps: int) -> None:
    run(model, sparsifier, optimizer, until=sparsifier.step + steps)


@pytest.mark.slow
@pytest.mark.parametrize("early_at", ["before sparsify_", 0, 4])
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("magnitude", {}),
        ("magnitude", {"storage": "packed"}),
        ("iterative", {}),
        ("group-lasso", {}),
        ("rigl", {}),
        ("rigl", {"storage": "dense"}),
        ("static", {}),
        ("two-phase", {"init": "nearest"}),
        ("kron-l1", {}),
    ],
)
def test_early_weights_come_back_under_the_final_mask(method, settings, early_at):
    model = normed()
    early, weights = copy_of(model), dense_weights(model)
    sparsifier = sparsify_(model, config(method, **settings))
    optimizer = attached(model, sparsifier)
    if early_at != "before sparsify_":
        train(model, sparsifier, optimizer, early_at)
        early, weights = copy_of(model), dense_weights(model)
    train(model, sparsifier, optimizer, STEPS - sparsifier.step)
    masks, trained = [target.mask.clone() for target in sparsifier.targets], dense_weights(model)
    assert sparsifier.phase == "heal" and optimizer.state
    if method == "kron-l1" and early_at == "before sparsify_":
        before = copy_of(model)
        with pytest.raises(KronblocksError, match=r"0 has factors now, but the state_dict has weight for it.*after sparsify_"):
            rewind_(sparsifier, early)
        assert same(copy_of(model), before) and optimizer.state
        return
    rewind_(sparsifier, early)
    for target, mask, was, now in zip(sparsifier.targets, masks, weights, dense_weights(model), strict=True):
        blocks = [target.grid.to_blocks(each) for each in (was, now)]
        assert torch.allclose(blocks[1][mask], blocks[0][mask], rtol=1e-5, atol=1e-6)  # built from factors it may round otherwise
        assert (blocks[1][~mask] == 0).all() and torch.equal(target.mask, mask)
        if "0.weight" in early:
            assert torch.equal(blocks[1][mask], blocks[0][mask])
    for name in ("0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked"):
        assert torch.equal(model.state_dict()[name], early[name])
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(one, other) for one, other in zip(dense_weights(model), trained, strict=True))
    train(model, sparsifier, optimizer, 10)
    assert all(torch.equal(target.mask, mask) for target, mask in zip(sparsifier.targets, masks, strict=True))
    assert sparsifier.sparsity == 0.75
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name == "step"]
    assert moments and all(value == 10 for value in moments)


def test_a_new_optimiser_after_rewinding():
    model = normed()
    early = copy_of(model)
    sparsifier = sparsify_(model, config("magnitude"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = sparsifier.attach(optimizer, total_steps=STEPS)
    train(model, sparsifier, optimizer, STEPS)
    masks = [target.mask.clone() for target in sparsifier.targets]
    handle.remove()
    rewind_(sparsifier, early)
    train(model, sparsifier, attached(model, sparsifier, 2 * STEPS), 2 * STEPS)
    assert all(torch.equal(target.mask, mask) for target, mask in zip(sparsifier.targets, masks, strict=True))
    assert sparsifier.sparsity == 0.75


def test_iterative_pruning_with_rewinding():
    """Train, prune, rewind, and again: each round from the same early weights, with fewer of them."""
    model = normed()
    early = copy_of(model)
    for target in (0.5, 0.75):
        sparsifier = sparsify_(model, SparsityConfig("magnitude", 8, target_sparsity=target, storage="packed"))
        train(model, sparsifier, attached(model, sparsifier), STEPS)
        rewind_(sparsifier, early)
        assert sparsifier.sparsity == target
        for layer, number in zip((model[0], model[2], model[4]), (0, 2, 4), strict=True):
            assert isinstance(layer, BlockLayer)
            wanted = layer.grid.to_blocks(early[f"{number}.weight"])[layer.block_mask]
            assert torch.equal(layer.grid.to_blocks(layer.dense_weight())[layer.block_mask], wanted)


def test_factors_that_were_lifted_by_hand_and_gates():
    model = normed()
    sparsifier = sparsify_(model, config("kron-l1"))
    optimizer = attached(model, sparsifier)
    train(model, sparsifier, optimizer, 5)
    early, weights = copy_of(model), dense_weights(model)
    train(model, sparsifier, optimizer, STEPS - 5)
    lift_(model, optimizer)
    rewind_(sparsifier, early)
    for target, was, now in zip(sparsifier.targets, weights, dense_weights(model), strict=True):
        assert torch.allclose(now, was * target.grid.expand(target.mask.float()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparsified", [False, True])
def test_convolutions(sparsified):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 1), nn.Flatten(0))
    model[2] = nn.Conv2d(16, 8, 1)
    early, weight = copy_of(model), model[0].weight.detach().clone()
    settings = SparsityConfig("magnitude", 4, target_sparsity=0.5, convolutions=True, storage="packed", measure_plans=False)
    sparsifier = sparsify_(model, settings)
    if sparsified:
        early = copy_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(2, 8, 5, 5)).square().mean().backward()
        optimizer.step()
    rewind_(sparsifier, early)
    now = model[0].weight
    assert torch.equal(now[now != 0], weight[now != 0]) and sparsifier.sparsity == 0.5
    assert torch.equal(model[0].linear.bias, early["0.linear.bias" if sparsified else "0.bias"])


def test_transposed_layers_of_transformers():
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(utils.Conv1D(32, 16))
    early, weight = copy_of(model), model[0].weight.detach().clone()
    rewind_(sparsify_(model, SparsityConfig("static", 8, target_sparsity=0.5)), early)
    now = model[0].weight
    assert torch.equal(now[now != 0], weight[now != 0]) and (now == 0).float().mean() == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("1.weight"), r"lacks 1\.weight"),
        (lambda state: state.update(extra=torch.ones(1)), "has in addition extra"),
        (lambda state: state.update({"1.bias": torch.ones(3)}), r"has with other sizes 1\.bias"),
        (lambda state: state.pop("0.weight"), "has no weights for 0, which is 32x32 in blocks of 8x8"),
        (lambda state: state.update({"2.weight": torch.ones(8, 32)}), "has weights of 8x32 for 2"),
    ],
)
@pytest.mark.parametrize("method", ["magnitude", "rigl"])
def test_states_that_do_not_fit_are_refused_and_change_nothing(method, change, says):
    model = normed()
    early = copy_of(model)
    sparsifier = sparsify_(model, config(method))
    sparsifier.save_with_model()
    before = copy_of(model)
    change(early)
    with pytest.raises(KronblocksError, match=says):
        rewind_(sparsifier, early)
    assert same(copy_of(model), before)
    with pytest.raises(KronblocksError, match="needs the model's state_dict of an earlier step, not Sequential"):
        rewind_(sparsifier, model)  # pyright: ignore[reportArgumentType]
