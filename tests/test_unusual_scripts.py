"""What a training script may do beside the plain loop: frozen and unused layers, hooks, submodules, lists of
parameters, pickles, several optimisers, derivatives of derivatives."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kronblocks import (
    KronblocksError,
    KronblocksWarning,
    SparsityConfig,
    densify_,
    export,
    from_pretrained,
    parameter_groups,
    save_pretrained,
    sparsify_,
)
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config import methods
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.surgery import apply_structure_, lift_, structure

STEPS = 24
METHODS = [method for method in methods.METHODS if method != "dense"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))


def config(method: str = "two-phase", **settings) -> SparsityConfig:
    return SparsityConfig(method=method, block_size=8, target_sparsity=0.75, **settings)  # pyright: ignore[reportArgumentType]


def step(model: nn.Module, sparsifier: Sparsifier, *optimizers: torch.optim.Optimizer) -> None:
    x = torch.randn(16, 32)
    loss = (model(x) - x[:, :16]).square().mean() + sparsifier.penalty()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def started(model: nn.Module, settings: SparsityConfig, within: nn.Module | None = None) -> tuple[Sparsifier, torch.optim.AdamW]:
    """Sparsify a model (or a part of it) and tie the sparsifier to an optimiser."""
    sparsifier = sparsify_(within or model, settings)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    return sparsifier, optimizer


def trained(model: nn.Module, settings: SparsityConfig, steps: int = STEPS, within: nn.Module | None = None) -> Sparsifier:
    """The same, and train it."""
    sparsifier, optimizer = started(model, settings, within)
    for _ in range(steps):
        step(model, sparsifier, optimizer)
    return sparsifier


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
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        forward = nn.Sequential(*list(model)[:5])  # the lift replaces layers
        step(forward, sparsifier, optimizer)
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
    with pytest.raises(KronblocksError, match=r"score='taylor' needs gradients, and 0 is frozen"):
        sparsify_(model, config("magnitude", score="taylor", frozen="sparsify"))
    model.add_module("unused", nn.Linear(32, 32))
    sparsifier, optimizer = started(model, config("magnitude", score="taylor"))
    assert [target.name for target in sparsifier.targets] == ["2", "4", "unused"]
    with pytest.raises(KronblocksError, match=r"frozen or unused out with exclude"):
        for _ in range(STEPS):
            step(model[:5], sparsifier, optimizer)


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


def test_named_parameters_have_their_names_after_the_lift():
    model = mlp()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        step(model, sparsifier, optimizer)
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_a_part_of_a_model_is_saved_and_exported_in_its_place(tmp_path):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(32, 32))  # the same name as the first layer of the part has there
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.get_submodule("0")(x))

    torch.manual_seed(1)
    model = Around()
    sparsifier = trained(model, config("magnitude"), within=model.inner)
    x = torch.randn(4, 32)
    again = from_pretrained(save_pretrained(model, tmp_path / "saved", sparsifier=sparsifier), Around)
    assert torch.allclose(again(x), model(x), atol=1e-6)
    assert isinstance(again.get_submodule("inner.0"), BlockLayer) and type(again.get_submodule("0")) is nn.Linear
    assert export(model, x, form="packed", sparsifier=sparsifier).error < 1e-5
    average = copy.deepcopy(model)  # a copy has other layers of the same names
    assert save_pretrained(average.inner, tmp_path / "average", sparsifier=sparsifier)
    with pytest.raises(KronblocksError, match="is no layer of this model"):
        save_pretrained(nn.Sequential(nn.Linear(3, 3)), tmp_path / "other", sparsifier=sparsifier)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_lower_precision_can_be_exported(dtype):
    model = mlp()
    trained(model, config())
    model.to(dtype)
    assert export(model, torch.randn(4, 32, dtype=dtype), form="dense").error < 0.05


def test_values_join_one_optimiser_when_factors_were_in_two():
    model = mlp()
    sparsifier = sparsify_(model, config())
    coefficients = [p for name, p in model.named_parameters() if name.endswith("coeff")]
    others = [p for name, p in model.named_parameters() if not name.endswith("coeff")]
    optimizers = [torch.optim.SGD(coefficients, lr=1e-2), torch.optim.SGD(others, lr=1e-2)]
    sparsifier.attach(optimizers, total_steps=STEPS)
    for _ in range(STEPS):
        step(model, sparsifier, *optimizers)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert sparsifier.sparsity >= 0.75


def test_fused_sgd_with_momentum_over_the_lift():
    weights = []
    for fused in (False, True):
        model = mlp()
        sparsifier = sparsify_(model, config(measure_plans=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, fused=fused)
        sparsifier.attach(optimizer, total_steps=STEPS)
        torch.manual_seed(2)
        for _ in range(STEPS):
            step(model, sparsifier, optimizer)
        weights.append(model[2].weight.detach())
    assert torch.allclose(*weights, rtol=1e-3, atol=1e-5)


def test_hooks_on_layers_go_on_over_the_lift():
    model = mlp()
    calls = {"kept": 0, "removed": 0}

    def hook(name: str):
        def count(*_) -> None:
            calls[name] += 1

        return count

    model[0].register_forward_hook(hook("kept"))
    handle = model[2].register_forward_pre_hook(hook("removed"))
    sparsifier, optimizer = started(model, config())
    for number in range(STEPS):
        if number == STEPS - 1:
            handle.remove()
        step(model, sparsifier, optimizer)
    assert calls == {"kept": STEPS, "removed": STEPS - 1}


def test_computed_weights_are_left_dense():
    model = mlp()
    nn.utils.spectral_norm(model[4])
    report = sparsify_(model, config()).surgery
    assert [(each.name, "spectral_norm" in each.reason) for each in report.left_dense] == [("4", True)]


def test_a_lift_by_hand_is_followed():
    model = mlp()
    sparsifier, optimizer = started(model, config("kron-l1"))
    for number in range(STEPS):
        if number == 5:
            lift_(model, optimizer)
        step(model, sparsifier, optimizer)
    weights = torch.cat([(layer.dense_weight() == 0).flatten() for layer in model if isinstance(layer, BlockLayer)])
    assert sparsifier.sparsity == float(weights.float().mean()) >= 0.75
    densify_(model)
    assert sparsifier.sparsity == float(weights.float().mean())


def test_parameters_that_were_replaced_have_no_gradient():
    model = mlp()
    sparsifier, optimizer = started(model, config())
    before = list(model.parameters())
    for _ in range(STEPS):
        step(model, sparsifier, optimizer)
    now = {id(p) for p in model.parameters()}
    assert [p.grad is None for p in before] == [id(p) not in now for p in before]


def test_nothing_is_replaced_where_no_slot_is_given_up():
    model = mlp()
    sparsifier = sparsify_(model, config("static"))
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        step(model, sparsifier, optimizer)
    assert [id(p) for p in model.parameters()] == before


@pytest.mark.parametrize("method", ["two-phase", "rigl", "magnitude"])
def test_layers_take_their_input_by_name(method):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(input=x)
            return x

    settings = config(method, regrow=0.2) if method != "rigl" else config(method)
    assert trained(Named(), settings).sparsity >= 0.75


def test_a_model_that_carries_its_state_can_be_copied_and_pickled():
    model = mlp()
    sparsifier = trained(model, config(), steps=5)
    sparsifier.save_with_model()
    assert "kronblocks_state" in model.state_dict()
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301
        assert "kronblocks_state" not in again.state_dict()
        assert torch.equal(again[0].dense_weight(), model[0].dense_weight())


@pytest.mark.parametrize("plan", ["dense", "tile_first", "coeff_first", "packed"])
def test_third_derivatives_as_in_the_loss_of_a_differential_equation(plan):
    model = mlp().double()
    sparsify_(model, config(layers=("2",)))
    layer = model[2]
    assert isinstance(layer, BlockLayer)
    mask = torch.rand(layer.grid.shape) < 0.5
    layer.set_block_mask_(mask)
    layer.use_plan_(plan)

    def gradients(product) -> list[Tensor]:
        x = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32).requires_grad_()
        y = model[4](model[3](product(model[1](model[0](x)))))
        first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad((second + x).square().mean(), [p for p in model.parameters() if p is not model[4].bias]))

    for found, wanted in zip(gradients(layer), gradients(lambda x: linear(x, layer.dense_weight(), layer.bias)), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12 * float(wanted.abs().max()))


def test_a_second_sparsifier_on_the_same_layers_is_refused():
    model = mlp()
    first = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    second = sparsify_(model, config())
    handle = first.attach(optimizer, total_steps=STEPS)
    other = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    for own in (optimizer, other):
        with pytest.raises(KronblocksError, match=r"another sparsifier, which is attached, follows 0, 2, 4: .*remove\(\)"):
            second.attach(own, total_steps=STEPS)
    layers = list(model)
    for method in ("two-phase", "rigl", "magnitude"):
        with pytest.raises(KronblocksError, match="another sparsifier, which is attached, follows 0, 2, 4"):
            sparsify_(model, config(method))
    assert all(now is before for now, before in zip(model, layers, strict=True))
    handle.remove()
    second.attach(optimizer, total_steps=STEPS)


@pytest.mark.parametrize("how", ["finished", "forgotten", "other layers"])
def test_a_second_sparsifier_may_follow_where_the_first_is_over_or_follows_others(how):
    model = mlp()
    layers = ("0",) if how == "other layers" else ("*",)

    def first_training() -> torch.optim.Optimizer | None:
        first, optimizer = started(model, config(layers=layers))
        for _ in range(STEPS if how == "finished" else 2):
            step(model, first, optimizer)
        return None if how == "forgotten" else optimizer  # forgotten: as by a cell of a notebook that is run again

    optimizer = first_training()
    later = {"other layers": ("2", "4")}.get(how, ("*",))
    second = sparsify_(model, SparsityConfig("magnitude", 8, target_sparsity=0.8, layers=later))
    own = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    second.attach(optimizer if how == "other layers" and optimizer else own, total_steps=STEPS)


@pytest.mark.parametrize("method", [method for method in METHODS if methods.spec_of(method).defaults.form == "gradient"])
def test_a_penalty_that_is_left_out_is_warned_of(method):
    for called in (False, True):
        model = mlp()
        sparsifier, optimizer = started(model, config(method))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", KronblocksWarning)
            for _ in range(3):
                loss = model(torch.randn(4, 32)).square().mean() + (sparsifier.penalty() if called else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert ["penalty() was not called" in str(each.message) for each in said] == [True] * (not called)


def test_wrong_kinds_of_arguments_are_one_sentence():
    with pytest.raises(KronblocksError, match="wants a model"):
        sparsify_([mlp()])  # pyright: ignore[reportArgumentType]
    with pytest.raises(KronblocksError, match="a number from 0 on"):
        parameter_groups(mlp(), lr="1e-3")  # pyright: ignore[reportArgumentType]
    for settings in ({"schedule": {"end": 0.3}}, {"penalty": None}, {"overrides": [1]}):
        with pytest.raises(KronblocksError, match=f"{next(iter(settings))} is a"):
            SparsityConfig(**settings)  # pyright: ignore[reportArgumentType]
