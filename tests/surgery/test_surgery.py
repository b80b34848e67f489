"""Surgery: what replaces what, what stays, and structure records."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from kronblocks import (
    BlockSparseLinear,
    KronblocksError,
    KroneckerBlockLinear,
    SparsityConfig,
    densify_,
    parameter_groups,
    sparsify_,
)
from kronblocks.config.methods import METHODS, spec_of
from kronblocks.core import PerformanceWarning
from kronblocks.surgery import apply_structure_, lift_, structure


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 12, bias=False), nn.Tanh(), nn.Linear(12, 5))


def config(**settings) -> SparsityConfig:
    factors = {"rank": 2} if spec_of(settings.get("method", "two-phase")).is_factored else {}
    return SparsityConfig(**{"block_size": 4, "target_sparsity": 0.5, **factors, **settings})


def test_sparsify_replaces_what_it_selected_and_keeps_biases_and_modes():
    model = mlp().eval()
    biases = {id(model[0].bias), id(model[4].bias)}
    sparsifier = sparsify_(model, config(tile_groups=1))
    assert [type(layer) for layer in model] == [KroneckerBlockLinear, nn.Tanh, KroneckerBlockLinear, nn.Tanh, nn.Linear]
    assert {id(p) for p in model.parameters() if p.dim() == 1} == biases
    assert model[2].bias is None and not model[0].training
    assert (model[0].rank, model[0].tile_groups, model[0].gate) == (2, 1, None)
    assert [each.name for each in sparsifier.surgery.left_dense] == ["4"]
    assert model(torch.randn(3, 24)).shape == (3, 5)


def test_default_tiles_are_per_block_row():
    model = mlp()
    sparsify_(model, config())
    assert model[0].tile_groups == 4


@pytest.mark.parametrize("method", ["magnitude", "iterative", "group-lasso", "elastic-group-lasso", "dense"])
def test_methods_on_plain_layers_replace_nothing(method):
    model = mlp()
    before = list(model)
    sparsify_(model, config(method=method))
    assert all(a is b for a, b in zip(before, model, strict=True))


@pytest.mark.parametrize("method", ["static", "rigl"])
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_methods_that_are_sparse_from_the_start(method, distribution):
    """Packed by default, with the weights and the bias of the dense layer on the live blocks; or on the nn.Linear itself.

    Weights begin larger, so that outputs begin as large as the dense layer's.
    """
    dense, packed, masked = mlp(), mlp(), mlp()
    for model in (packed, masked):
        model.load_state_dict(dense.state_dict())
    torch.manual_seed(0)
    sparsifier = sparsify_(packed, config(method=method, distribution=distribution))
    torch.manual_seed(0)
    sparsify_(masked, config(method=method, distribution=distribution, storage="dense"))
    assert isinstance(packed[0], BlockSparseLinear) and type(masked[0]) is nn.Linear
    assert sparsifier.sparsity == config().target_sparsity
    for name in ("0", "2"):
        ours, theirs, old = (model.get_submodule(name) for model in (packed, masked, dense))
        assert torch.equal(ours.weight, theirs.weight) and (old.bias is None or torch.equal(ours.bias, old.bias))
        density = (ours.weight != 0).float().mean().item()
        assert density < 1 and torch.equal(ours.weight, old.weight * density**-0.5 * (ours.weight != 0))


def test_trained_weights_and_blocks_of_greatest_norm_keep_their_scale():
    torch.manual_seed(0)
    trained = nn.Linear(64, 64)
    with torch.no_grad():
        trained.weight.add_(torch.randn(64, 1) @ torch.randn(1, 64))
    for linear, init in ((trained, "random"), (nn.Linear(64, 64), "nearest")):
        for storage in ("packed", "dense"):
            model = nn.Sequential(copy.deepcopy(linear))
            sparsify_(model, config(method="static", init=init, storage=storage))
            weight = model[0].weight
            assert ((weight == linear.weight) | (weight == 0)).all()


def test_inits():
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    nn.init.normal_(linear.weight, std=0.02)
    variance = linear.weight.detach().square().mean().item()

    def weight(**settings) -> torch.Tensor:
        model = nn.Sequential(copy.deepcopy(linear))
        sparsify_(model, config(tile_groups=1, **settings))
        return model[0].weight.detach()

    for init in ("random", "spectral"):  # the truncated SVD alone would be at 0.26, nn.Linear's default at 3.3
        assert weight(init=init).square().mean().item() == pytest.approx(variance, rel=1e-4)
    nearest, spectral = weight(init="nearest"), weight(init="spectral")
    blocks = linear.weight.detach().view(64, 4, 64, 4).transpose(1, 2).reshape(-1, 16)
    tail = torch.linalg.svdvals(blocks)[2:].square().sum().sqrt()
    assert (nearest - linear.weight).norm().item() == pytest.approx(tail.item(), rel=1e-4)
    scale = (spectral.norm() / nearest.norm()).item()
    assert scale > 1.3 and torch.allclose(spectral, scale * nearest, atol=1e-5)


def test_kron_l1_has_a_gate_of_ones_and_the_spectral_init():
    model = nn.Sequential(nn.Linear(64, 64))
    dense = model[0].weight.detach().clone()
    sparsify_(model, config(method="kron-l1", rank=16))
    assert (model[0].gate == 1).all()
    assert torch.allclose(model[0].weight, dense, atol=1e-5)  # rank 16 in 4x4 blocks is exact


@pytest.fixture(autouse=True)
def _allow_full_rank_warning(request):
    if "gate_of_ones" in request.node.name:
        with pytest.warns(PerformanceWarning):
            yield
    else:
        yield


def test_full_rank_is_a_performance_warning():
    with pytest.warns(PerformanceWarning, match="as many factors as there are weights"):
        sparsify_(nn.Sequential(nn.Linear(8, 8)), SparsityConfig(block_size=2, rank=4, target_sparsity=0.5))


def test_a_module_in_two_places_is_replaced_in_both():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": shared})
    sparsify_(model, config())
    assert isinstance(model["a"], KroneckerBlockLinear) and model["a"] is model["b"][0] is model["c"]


def test_frozen_layers_stay_frozen():
    model = mlp().requires_grad_(False)
    sparsify_(model, config(frozen="sparsify", init="nearest"))
    assert not any(p.requires_grad for p in model.parameters())


def test_lift_by_hand_keeps_outputs_and_moves_the_optimiser():
    model = mlp()
    sparsify_(model, config())
    mask = torch.rand(4, 6) < 0.5
    mask[0, 0] = True
    model[0].set_block_mask_(mask)
    for groups, places in ((parameter_groups(model, lr=0.1), None), (model.parameters(), [0, 2])):
        lifted = copy.deepcopy(model)
        twin = {id(a): b for a, b in zip(model.parameters(), lifted.parameters(), strict=True)}
        groups = [{**g, "params": [twin[id(p)] for p in g["params"]]} for g in groups] if places is None else lifted.parameters()
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        x = torch.randn(3, 24)
        before = lifted(x)
        assert lift_(lifted, optimizer) == ["0", "2"]
        assert torch.allclose(before, lifted(x), atol=1e-6)  # fp32, another order of summation
        assert isinstance(lifted[0], BlockSparseLinear) and lifted[0].capacity == int(mask.sum())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in lifted.parameters()}
        if places is None:
            assert [g["name"] for g in optimizer.param_groups if any(p is lifted[0].values for p in g["params"])] == ["lifted"]
        else:
            assert [next(i for i, p in enumerate(held) if p is lifted[k].values) for k in (0, 2)] == places


def test_densify_gives_back_plain_layers_with_the_same_outputs():
    model = mlp()
    sparsify_(model, config())
    model[0].set_block_mask_(torch.rand(4, 6) < 0.5)
    lift_(model[2:])  # one layer of each kind
    x = torch.randn(3, 24)
    before = model(x)
    assert densify_(model) == ["0", "2"]
    assert all(type(layer) in (nn.Linear, nn.Tanh) for layer in model)
    assert torch.allclose(before, model(x), atol=1e-6)  # fp32, another order of summation
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_structure_records_are_plain_and_rebuild_the_model():
    model = mlp()
    sparsify_(model, config(tile_groups=2))
    model[0].set_block_mask_(torch.rand(4, 6) < 0.5)
    lift_(model[:1])
    record = json.loads(json.dumps(structure(model)))
    fresh = mlp()
    apply_structure_(fresh, record)
    assert [type(a) for a in fresh] == [type(a) for a in model]
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(2, 24)
    assert torch.equal(model(x), fresh(x))
    layers = list(fresh)
    apply_structure_(fresh, record)
    assert all(a is b for a, b in zip(layers, fresh, strict=True))  # nothing to do the second time


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.update(version=9), "version 9"),
        (lambda r: r.pop("layers"), "no structure record"),
        (lambda r: r["layers"].update({"7": r["layers"]["0"]}), "layer '7'"),
        (lambda r: r["layers"]["0"].update(kind="os.system"), "unknown kind"),
        (lambda r: r["layers"]["0"].update(in_features=48), "other sizes"),
        (lambda r: r["layers"]["0"].update(block_size="5x5"), "does not divide"),
        (lambda r: r["layers"]["0"].update(surprise=1), "does not know"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_change_nothing(change, says):
    model = mlp()
    sparsify_(model, config())
    record = structure(model)
    change(record)
    fresh = mlp()
    layers = list(fresh)
    with pytest.raises(KronblocksError, match=says):
        apply_structure_(fresh, record)
    assert all(a is b for a, b in zip(layers, fresh, strict=True))


def test_parameter_groups_cover_every_parameter_once_with_the_right_rates():
    model = nn.Sequential(*mlp(), nn.LayerNorm(5), nn.Conv1d(2, 3, 1))
    sparsify_(model, config())
    scales = {"factor_lr_scale": 2.0, "tile_lr_scale": 0.5, "lifted_lr_scale": 3.0}
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3, factor_weight_decay=0.2, **scales)
    found = {g["name"]: (round(g["lr"], 9), g["weight_decay"], len(g["params"])) for g in groups}
    assert found == {
        "dense": (0.1, 0.3, 2),
        "no-decay": (0.1, 0.0, 5),
        "coefficients": (0.2, 0.2, 2),
        "tiles": (0.1, 0.2, 2),
        "lifted": (0.3, 0.3, 0),
    }
    apart = parameter_groups(model, lr=0.1, factor_weight_decay=0.2, lifted_weight_decay=0.4)
    assert [g["weight_decay"] for g in apart] == [0.0, 0.0, 0.2, 0.2, 0.4]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    with pytest.raises(KronblocksError, match="tile_lr_scale is a number"):
        parameter_groups(model, lr=0.1, tile_lr_scale=-1.0)
    for lr in (-1.0, math.inf, math.nan):
        with pytest.raises(KronblocksError, match="lr is a number"):
            parameter_groups(model, lr=lr)


def test_sparsify_wants_a_config():
    with pytest.raises(KronblocksError, match="SparsityConfig"):
        sparsify_(mlp(), {"block_size": 4})


def test_meta_models_can_be_sparsified_and_filled_later():
    with torch.device("meta"):
        model = mlp()
    sparsify_(model, config())
    assert all(p.is_meta for p in model.parameters())
    source = mlp()
    sparsify_(source, config())
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 24)
    assert torch.equal(model(x), source(x))


STORED = [(method, None) for method in METHODS if method != "dense"]
STORED += [(method, "dense") for method in METHODS if spec_of(method).starts_sparse]


@pytest.mark.parametrize(("method", "storage"), STORED)
def test_meta_models_can_be_made_real_and_trained_anew(method, storage):
    with torch.device("meta"):
        model = mlp()
    sparsifier = sparsify_(model, SparsityConfig(method=method, block_size=4, target_sparsity=0.5, storage=storage))
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier.attach(optimizer, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        (model(torch.randn(4, 24)).square().mean() + sparsifier.penalty()).backward()
        optimizer.step()
    assert sparsifier.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        sparsify_(model, SparsityConfig(block_size=8))
        assert model(torch.randn(2, 64)).dtype == dtype
    finally:
        torch.set_default_dtype(before)


def test_wrong_kinds_of_arguments_are_one_sentence():
    with pytest.raises(KronblocksError, match="needs a model"):
        sparsify_([mlp()])
    with pytest.raises(KronblocksError, match="a number from 0 on"):
        parameter_groups(mlp(), lr="1e-3")
