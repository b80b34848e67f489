"""Frozen layers are left as they are, do not count in the target, and become sparse only on request."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.helpers import METHODS, STEPS, attached, config, mlp, run, started
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    KroneckerBlockLinear,
    SearchTask,
    SparsityConfig,
    advise,
    densify_,
    find_block_size,
    parameter_groups,
    sparsify_,
)
from kronblocks.config import RankChoice
from kronblocks.nn.base import BlockLayer
from kronblocks.ops.costs.timing_cache import forget_timings
from kronblocks.search.config import SearchConfig
from kronblocks.surgery import apply_structure_, lift_, select, structure


def pretrained() -> nn.Sequential:
    """A backbone of two frozen layers, and a head of two that are trained."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).requires_grad_(False)
    return nn.Sequential(backbone, nn.ReLU(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


def trained(model: nn.Module, chosen: SparsityConfig):
    sparsifier = sparsify_(model, chosen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    return sparsifier


@pytest.mark.parametrize("method", METHODS)
def test_they_compute_what_they_did_and_do_not_count(method):
    model, x = pretrained(), torch.randn(8, 32)
    before = model[0](x)
    sparsifier = trained(model, config(method))
    assert torch.equal(model[0](x), before)
    assert [target.name for target in sparsifier.targets] == ["2", "4"]
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)  # of the head's blocks alone
    left = {each.name: each.reason for each in sparsifier.surgery.left_dense}
    assert set(left) == {"0.0", "0.2"} and all("frozen='sparsify'" in reason for reason in left.values())


@pytest.mark.parametrize("method", METHODS)
def test_on_request_they_become_sparse_and_stay_frozen(method):
    """Without gradients blocks die by their norms, and what lives keeps its values, up to the factors' error."""
    model = pretrained()
    weight = model[0][0].weight.clone()
    factored = method in ("two-phase", "kron-l1")
    init = {"init": "nearest"} if factored or method in ("rigl", "static") else {}
    exact = {"rank": 64, "tile_groups": 1} if factored else {}  # as many terms as a block has weights
    with pytest.warns(match="trains as many factors") if factored else nullcontext():
        sparsifier = trained(model, config(method, frozen="sparsify", **init, **exact))
    assert [target.name for target in sparsifier.targets] == ["0.0", "0.2", "2", "4"]
    assert not any(p.requires_grad for p in model[0].parameters())
    densify_(model)
    now = model[0][0].weight
    live = now != 0
    assert 0 < live.float().mean() < 1 and sparsifier.sparsity >= 0.7
    if method not in ("kron-l1", "group-lasso", "elastic-group-lasso"):  # these shrink what is there
        torch.testing.assert_close(now[live], weight[live], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["two-phase", "rigl", "static"])
def test_random_values_that_nobody_trains_are_refused_unless_asked_for(method):
    with pytest.raises(KronblocksError, match=r"0\.0 is frozen, and method .* never trained: write init='nearest'"):
        sparsify_(pretrained(), config(method, frozen="sparsify"))
    assert len(sparsify_(pretrained(), config(method, frozen="sparsify", init="random")).targets) == 4


def test_a_frozen_bias_is_no_frozen_layer_and_a_trained_one_no_trained_layer():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16))
    model[0].bias.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    bias = model[1].bias
    sparsifier = sparsify_(model, config())
    assert [target.name for target in sparsifier.targets] == ["0", "2"]
    assert type(model[1]) is nn.Linear and model[1].bias is bias and bias.requires_grad
    assert isinstance(model[0], KroneckerBlockLinear) and not model[0].bias.requires_grad


@pytest.mark.parametrize("method", ["two-phase", "magnitude", "static"])
def test_a_model_that_is_all_frozen_says_so(method):
    model = pretrained().requires_grad_(False)
    before = dict(model.named_modules())
    with pytest.raises(
        KronblocksError, match=r"every layer that could become sparse is frozen \(0\.0, 0\.2, 2, \.\.\.: requires"
    ):
        sparsify_(model, config(method))
    assert dict(model.named_modules()) == before
    with pytest.raises(KronblocksError, match="frozen='sparsify'"):  # the reasons of others do not hide it
        select(model, config(method, exclude=("2",)))


def test_convolutions_and_ranks_go_by_the_same_rule():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    report = select(model, config(convolutions=True, init="nearest", rank=RankChoice(max_parameters=1.0)))
    assert [each.name for each in report.selected] == ["1.linear", "4"]
    assert {each.name for each in report.left_dense if "frozen" in each.reason} == {"0", "3"}


def test_the_search_and_the_advice_leave_them_out_too(monkeypatch):
    monkeypatch.setattr("kronblocks.ops.costs.timing.BUDGET", 0.0)
    forget_timings()
    model = pretrained()

    def batches(seed: int):
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(16, 32, generator=generator)

    def losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return (model(x) - x[:, :16]).square().mean(1)

    task = SearchTask(batches, held_out=[torch.randn(32, 32)], losses=losses, lr=1e-2)
    report = find_block_size(model, config(), task, total_steps=200, search=SearchConfig(sizes=(4, 8)))
    assert set(report.chosen) == {"2", "4"}
    kept = {layer.names: layer.left_dense for layer in advise(model, rows=4, block_size=8).layers}
    assert all(("frozen" in why) == (set(names) <= {"0.0", "0.2"}) for names, why in kept.items())
    asked = advise(model, rows=4, block_size=8, frozen="sparsify").layers
    assert not any(layer.left_dense for layer in asked)
    with pytest.raises(KronblocksError, match="frozen='sparsify'"):
        advise(model.requires_grad_(False), rows=4, block_size=8)
    forget_timings()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.head(self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("method", ["two-phase", "magnitude"])
def test_lora_before_sparsify(method):
    """The layers under the adapter are frozen, and the adapter's own matrices are no layers to prune."""
    adapted = get_peft_model(Net(), LoraConfig(r=16, target_modules=["up", "down"], modules_to_save=["head"]))
    x = torch.randn(4, 32)
    before = adapted(x)
    report = sparsify_(adapted, config(method, exclude=("*head.original_module",))).surgery
    assert [each.name for each in report.selected] == ["base_model.model.head.modules_to_save.default"]
    reasons = {each.name.rpartition("model.")[2]: each.reason for each in report.left_dense}
    assert "frozen" in reasons["up.base_layer"] and "adapter" in reasons["up.lora_A.default"]
    if method == "magnitude":
        assert torch.equal(adapted(x), before)
    with pytest.raises(KronblocksError, match="every layer that could become sparse is frozen"):
        sparsify_(get_peft_model(Net(), LoraConfig(r=16, target_modules=["up", "down"])), config(method))


def test_lora_over_frozen_layers_that_are_pruned_on_request():
    adapted = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up", "down"]))
    sparsifier = sparsify_(adapted, config("magnitude", frozen="sparsify", layers=("*.base_layer",)))
    optimizer = torch.optim.AdamW(parameter_groups(adapted, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        adapted(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    assert sparsifier.sparsity >= 0.75


@pytest.mark.parametrize("value", ["dense", None, True])
def test_other_values_are_refused(value):
    with pytest.raises(KronblocksError, match="frozen"):
        config(frozen=value)


@pytest.mark.filterwarnings("ignore:pruning has ended")  # of kron-l1: gates of a frozen layer stay at 1, and all others die
@pytest.mark.parametrize("method", METHODS)
def test_frozen_layers_and_layers_that_are_not_used(method):
    model = mlp()
    model.add_module("unused", nn.Linear(32, 32))
    model[0].requires_grad_(False)
    weight = model[0].weight.detach().clone()
    init = {"rigl": {"init": "nearest"}, "static": {"init": "random"}, "two-phase": {"init": "random"}}.get(method, {})
    sparsifier = sparsify_(model, config(method, frozen="sparsify", **init))
    frozen = model[0].weight.detach().clone()
    optimizer = attached(model, sparsifier)
    run(lambda x: nn.Sequential(*list(model)[:5])(x), sparsifier, optimizer)  # the lift replaces layers
    assert sparsifier.sparsity >= 0.75
    assert not any(p.requires_grad for p in model[0].parameters())
    live = model[0].weight != 0
    if method in ("rigl", "static"):  # no gradient asks for other blocks
        assert torch.equal(model[0].weight, frozen)
    elif method not in ("two-phase", "kron-l1", "group-lasso", "elastic-group-lasso"):
        assert torch.equal(model[0].weight[live], weight[live])


def test_a_taylor_score_of_a_frozen_or_unused_layer_says_what_to_do():
    model = mlp()
    model[0].requires_grad_(False)
    with pytest.raises(KronblocksError, match=r"score='taylor' needs gradients, but 0 is frozen"):
        sparsify_(model, config("magnitude", score="taylor", frozen="sparsify"))
    model.add_module("unused", nn.Linear(32, 32))
    sparsifier, optimizer = started(model, config("magnitude", score="taylor"))
    assert [target.name for target in sparsifier.targets] == ["2", "4", "unused"]
    with pytest.raises(KronblocksError, match=r"frozen or unused, name it in exclude"):
        run(model[:5], sparsifier, optimizer)


@pytest.mark.parametrize("method", ["two-phase", "kron-l1", "rigl", "static"])
@pytest.mark.parametrize("weights", [False, True])
def test_what_is_frozen_stays_frozen(method, weights):
    model = mlp()
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(weights)
        layer.bias.requires_grad_(not weights)
    sparsify_(model, config(method, frozen="sparsify", init="random"))
    for layer in (model[0], model[2]):
        assert isinstance(layer, BlockLayer) and isinstance(layer.bias, nn.Parameter)
        assert layer.bias.requires_grad is not weights
        assert {p.requires_grad for p in layer.block_parameters()} == {weights}
    again = mlp()  # resumed, with layers of another kind than sparsify_ makes
    for layer in (again[0], again[2]):
        layer.weight.requires_grad_(weights)
    lift_(model)
    apply_structure_(again, structure(model))
    for layer in (again[0], again[2]):
        assert isinstance(layer, BlockSparseLinear) and layer.values.requires_grad is weights
    densify_(model)
    assert model[0].weight.requires_grad is weights and model[0].bias.requires_grad is not weights
