"""Layers that the user replaces after sparsify_: followed where the library did it, named where not; never reported on."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tests.helpers import METHODS, STEPS, attached, config, mlp, run
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from kronblocks import KronblocksError, SparsityConfig, densify_, from_pretrained, save_pretrained, sparsify_
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.surgery import lift_


def sparse(method: str, **settings) -> tuple[nn.Sequential, Sparsifier]:
    model = mlp(32, 32, 32, 16)
    return model, sparsify_(model, config(method, **settings))


def new_head(model: nn.Sequential) -> str:
    model[4] = nn.Linear(32, 16)
    return "a Linear of 16x32 stands there now"


def larger_head(model: nn.Sequential) -> str:
    model[4] = nn.Linear(32, 24)
    return "a Linear of 24x32 stands there now"


def removed(model: nn.Sequential) -> str:
    del model[4]
    return "nothing stands there now"


def identity(model: nn.Sequential) -> str:
    model[4] = nn.Identity()
    return "a Identity stands there now"


CHANGES = [new_head, larger_head, removed, identity]
KINDS = ["two-phase", "rigl", "magnitude"]  # factors, live blocks, plain layers


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", KINDS)
def test_attach_names_layers_that_were_replaced_before(method, change):
    model, sparsifier = sparse(method)
    says = change(model)
    with pytest.raises(KronblocksError, match=rf"1 of the layers .* was replaced .*\(4: {says}.*exclude=\('4',\)"):
        sparsifier.attach(torch.optim.AdamW(model.parameters()), total_steps=STEPS)


@pytest.mark.parametrize(("change", "at"), [(new_head, 5), (new_head, 25), (larger_head, 25), (removed, 5)])
@pytest.mark.parametrize("method", KINDS)
def test_the_next_step_names_layers_that_were_replaced_in_a_training(method, change, at):
    model, sparsifier = sparse(method)
    optimizer = attached(model, sparsifier)
    run(model, sparsifier, optimizer, until=at)
    says = change(model)
    optimizer.add_param_group({"params": [p for layer in model[4:] for p in layer.parameters()]})
    with pytest.raises(KronblocksError, match=rf"\(4: {says}.*call sparsify_ again"):
        run(model, sparsifier, optimizer, until=sparsifier.step + 1)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", KINDS)
def test_a_report_leaves_them_out_names_them_and_changes_nothing(method, change):
    model, sparsifier = sparse(method)
    run(model, sparsifier, attached(model, sparsifier))
    says = change(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sparsifier.report()
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert f"4 ({says})" in report.notes[0] and says in str(report) and report.to_dict()["notes"] == list(report.notes)
    zero = [(model[i].weight == 0).float().mean() for i in (0, 2)]
    assert sparsifier.sparsity == pytest.approx(float(sum(zero)) / 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_copy_of_a_plain_layer_is_another_layer():
    model, sparsifier = sparse("magnitude")
    model[4] = copy.deepcopy(model[4])
    with pytest.raises(KronblocksError, match="4: a Linear of 16x32 stands there now"):
        sparsifier.attach(torch.optim.AdamW(model.parameters()), total_steps=STEPS)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("method", ["two-phase", "rigl"])
def test_a_plain_layer_in_the_place_of_a_block_layer_keeps_its_weight_when_asked_about(method, trained):
    model, sparsifier = sparse(method)
    if trained:
        run(model, sparsifier, attached(model, sparsifier))
    new_head(model)
    weight = model[4].weight.detach().clone()
    assert sparsifier.sparsity >= 0 and torch.equal(model[4].weight, weight)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_library_replaces_is_followed(method):
    model, sparsifier = sparse(method)
    run(model, sparsifier, attached(model, sparsifier))
    before = sparsifier.report()
    densify_(model)
    after = sparsifier.report()
    assert [(layer.name, layer.kind) for layer in after.layers] == [(name, "Linear") for name in ("0", "2", "4")]
    assert (after.live_blocks, after.notes) == (before.live_blocks, ())


def test_a_question_does_not_zero_layers_that_were_made_dense_and_trained_on():
    model, sparsifier = sparse("two-phase")
    run(model, sparsifier, attached(model, sparsifier))
    densify_(model)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    weight = model[2].weight.detach().clone()
    layers = sparsifier.report().layers
    assert layers[1].live_blocks == layers[1].total_blocks and layers[0].sparsity > 0
    assert sparsifier.sparsity < 0.75 and torch.equal(model[2].weight, weight)


def test_a_question_counts_the_layers_that_are_there_and_only_a_step_goes_on_with_them():
    model, sparsifier = sparse("static")
    optimizer, old = attached(model, sparsifier), model[2]
    mask = torch.zeros(4, 4, dtype=torch.bool).index_fill_(0, torch.tensor(0), True)
    model[2] = BlockSparseLinear(32, 32, 8, mask=mask)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    assert sparsifier.report().layers[1].live_blocks == 4 and not sparsifier.masks_linears
    assert sparsifier.targets[1].module is old
    run(model, sparsifier, optimizer, until=sparsifier.step + 1)
    assert sparsifier.targets[1].module is model[2]


def test_a_model_with_a_new_head_is_saved_with_its_other_layers_packed(tmp_path):
    def make() -> nn.Sequential:
        model = sparse("magnitude")[0]
        larger_head(model)
        return model

    model, sparsifier = sparse("magnitude")
    run(model, sparsifier, attached(model, sparsifier))
    larger_head(model)
    again = from_pretrained(save_pretrained(model, tmp_path / "saved", sparsifier=sparsifier), make)
    assert isinstance(again, nn.Sequential)
    assert [type(again[i]) for i in (0, 2, 4)] == [BlockSparseLinear, BlockSparseLinear, nn.Linear]
    x = torch.randn(4, 32)
    assert torch.allclose(again(x), model(x), atol=1e-6)


def test_layers_that_are_wrapped_or_moved_stay_followed():
    class Around(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.inner = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    for method in ("magnitude", "kron-l1"):
        model, sparsifier = sparse(method)
        optimizer = attached(model, sparsifier)
        model[0] = Around(model[0])
        run(model, sparsifier, optimizer)
        assert sparsifier.sparsity == 0.75 and len(sparsifier.report().layers) == 3
    moved = nn.Sequential()
    moved.add_module("first", nn.Linear(32, 32))
    moved.add_module("second", nn.Linear(32, 32))
    sparsifier = sparsify_(moved, SparsityConfig(method="magnitude", block_size=8, target_sparsity=0.5))
    moved.add_module("other", moved.first)
    del moved.first
    assert [layer.name for layer in sparsifier.report().layers] == ["first", "second"]


def test_values_that_no_optimiser_has_are_told_of():
    model, sparsifier = sparse("kron-l1")
    optimizer = attached(model, sparsifier)
    run(model, sparsifier, optimizer, until=3)
    lift_(model)  # without the optimiser
    with pytest.raises(KronblocksError, match=r"0, 2, 4 have parameters now that no optimiser holds.*lift_\(model, optimizer\)"):
        run(model, sparsifier, optimizer, until=sparsifier.step + 1)


def test_a_weight_that_is_another_parameter_now_is_told_of_and_masked_where_an_optimiser_has_it():
    model, sparsifier = sparse("magnitude")
    optimizer = attached(model, sparsifier)
    run(model, sparsifier, optimizer, until=25)
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(KronblocksError, match="2 has parameters now that no optimiser holds"):
        run(model, sparsifier, optimizer, until=sparsifier.step + 1)
    optimizer.add_param_group({"params": [model[2].weight]})
    run(model, sparsifier, optimizer, until=sparsifier.step + 1)
    target = sparsifier.targets[1]
    optimizer.zero_grad()
    model(torch.randn(8, 32)).sum().backward()
    assert (target.grid.norms(model[2].weight.grad)[~target.mask] == 0).all() and not target.mask.all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda layer: parametrizations.spectral_norm(layer), "its weight is computed from others now"),
        (lambda layer: parametrizations.weight_norm(layer), "its weight is computed from others now"),
        (lambda layer: prune.random_unstructured(layer, "weight", amount=0.5), "its weight is computed from others now"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(40, 32))), "its weight is one of 40x32 now"),
    ],
)
def test_weights_that_are_changed_in_place(change, says):
    """As spectral_norm, weight_norm and prune do, and resize_token_embeddings of some models."""
    model, sparsifier = sparse("magnitude")
    change(model[0])
    with pytest.raises(KronblocksError, match=f"0: {says}"):
        sparsifier.attach(torch.optim.AdamW(model.parameters()), total_steps=STEPS)
    assert f"0 ({says}" in str(sparsifier.report())


def test_quantised_layers_are_left_out_of_the_report():
    model, sparsifier = sparse("magnitude")
    run(model, sparsifier, attached(model, sparsifier))
    with warnings.catch_warnings():  # torch says that it has something newer
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    report = sparsifier.report()
    assert report.layers == () and len(report.notes) == 3 and report.block_sparsity == 0
    assert "0 (a torch.ao.nn.quantized.dynamic.modules.linear.Linear stands there now)" in str(report)


def test_block_layers_that_the_user_puts_in_place_are_followed():
    model, sparsifier = sparse("kron-l1")
    layer = model[2]
    model[2] = BlockSparseLinear.from_kron(layer)
    optimizer = attached(model, sparsifier)
    run(model, sparsifier, optimizer)
    assert sparsifier.sparsity == 0.75 and sparsifier.report().layers[1].kind == "BlockSparseLinear"


def test_after_the_layer_was_replaced_sparsify_again_goes_on():
    """What the error says to write."""
    model, sparsifier = sparse("two-phase", exclude=("4",))
    run(model, sparsifier, attached(model, sparsifier))
    model[4] = nn.Linear(32, 24)
    model[2] = nn.Linear(32, 32)
    again = sparsify_(model, SparsityConfig(block_size=8, target_sparsity=0.75, exclude=("4",), measure_plans=False))
    run(model, again, attached(model, again))
    assert again.sparsity == 0.75 and isinstance(model[0], BlockLayer)


@pytest.mark.parametrize("change", [lambda layer: prune.l1_unstructured(layer, "weight", 0.3), parametrizations.weight_norm])
def test_a_weight_that_is_computed_from_others_now_stops_no_other_training(change):
    model, sparsifier = sparse("magnitude")
    run(model, sparsifier, attached(model, sparsifier))
    change(model[0])
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert "0 (its weight is computed from others now)" in str(sparsifier.report())
