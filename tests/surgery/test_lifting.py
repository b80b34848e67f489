"""Whatever held a parameter before the lift, or before dead slots end, goes on with it afterwards, or says that it does not."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.helpers import STEPS, WAYS, free_layers, loss_of, made, mlp, run, zeros
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.optim import _apply_optimizer_in_backward

from kronblocks import KronblocksError, KronblocksWarning, SparsityConfig, parameter_groups, sparsify_
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.surgery import lift_
from kronblocks.surgery.lift import lift_layers_


def test_values_are_the_object_that_the_coefficients_were():
    model, sparsifier = made()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    before = [layer.coeff for layer in (model[0], model[2])]
    held = list(model.parameters())
    run(model, sparsifier, optimizer)
    assert all(layer.values is old for layer, old in zip(free_layers(model), before, strict=True))
    assert {id(p) for p in model.parameters()} <= {id(p) for p in held}
    # a list that was made before the training still counts and clips every gradient
    norm = torch.nn.utils.clip_grad_norm_(held, 1e-3)
    assert float(norm) > 1e-3
    assert float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_a_graph_from_before_the_lift_may_stay_alive():
    """As the loss of the last step does in every loop: autograd would expect gradients of the old shape."""
    model, _ = made()
    kept = loss_of(model, 0)
    kept.backward()
    lift_(model, torch.optim.SGD(model.parameters(), lr=0.1))
    loss_of(model, 1).backward()
    assert all(layer.values.grad is not None and layer.values.grad.shape == layer.values.shape for layer in free_layers(model))
    for layer in free_layers(model):
        layer.set_block_mask_(torch.zeros_like(layer.block_mask).index_fill(0, torch.tensor([0]), True))
    kept = loss_of(model, 0)
    kept.backward()
    for layer in free_layers(model):
        values = layer.values
        layer.compact_()
        assert layer.values is values and values.grad is None
    loss_of(model, 1).backward()


def test_a_layer_that_another_model_shares_stays_as_it_was():
    model, _ = made()
    other = model[2:]
    before = other[0].dense_weight().clone()
    lift_(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert isinstance(model[2], BlockSparseLinear) and torch.equal(other[0].dense_weight(), before)


def test_factors_that_two_layers_share_are_refused_at_the_start():
    model, sparsifier = made()
    model.append(nn.Linear(16, 16))
    model[2].tiles = nn.Parameter(model[0].tiles[: model[2].tile_groups].detach().clone())
    model[0].register_parameter("tiles", model[2].tiles)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KronblocksError, match="0 and 2 share factors.*one module in both places"):
        sparsifier.attach(optimizer, total_steps=STEPS)
    with pytest.raises(KronblocksError, match="0 and 2 share factors"):
        lift_(model, optimizer)


def test_a_layer_that_was_wrapped_after_sparsify_is_lifted_inside():
    model, sparsifier = made()
    model[0] = CheckpointWrapper(model[0])
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    inner = model[0]._checkpoint_wrapped_module
    assert isinstance(inner, BlockSparseLinear) and inner.capacity == int(inner.block_mask.sum())
    assert sparsifier.sparsity == 0.75
    model, sparsifier = made()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    sparsifier.attach(optimizer, total_steps=STEPS)
    model[0] = nn.Linear(32, 32)
    with pytest.raises(KronblocksError, match="0 is now a Linear, not the layer"):
        lift_layers_(model, ["2", "0"], [optimizer])
    assert not isinstance(model[2], BlockSparseLinear)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_wrappers_that_show_nothing_of_what_they_hold():
    """Around a layer they are looked through; around a part of the model they hide its layers, which is said at the start."""
    model, sparsifier = made()
    model[0] = Around(model[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    assert isinstance(model[0].inner, BlockSparseLinear) and sparsifier.targets[0].module is model[0].inner
    assert sparsifier.sparsity == 0.75
    whole = nn.ModuleDict({"body": mlp(32, 32, 16), "head": nn.Linear(16, 16)})
    sparsifier = sparsify_(whole, SparsityConfig(block_size=4, rank=2, target_sparsity=0.75))
    whole["body"] = Around(whole["body"])
    with pytest.raises(KronblocksError, match=r"body.0, body.2 are no longer found.*before sparsify_"):
        sparsifier.attach(torch.optim.SGD(whole.parameters(), lr=0.1), total_steps=STEPS)


# Loops


@pytest.mark.parametrize("method", WAYS)
def test_an_optimiser_for_each_parameter_steps_in_backward(method):
    model, sparsifier = made(method)
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    sparsifier.attach(list(optimizers.values()), total_steps=STEPS)
    seen = []
    for number in range(STEPS):
        loss_of(model, number).backward()
        seen.append(model[0].weight.detach().clone())
        assert sparsifier.step == number + 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    assert zeros(model) == pytest.approx(0.75, abs=0.02)


def test_stepping_in_backward_is_stepping_afterwards():
    """The same bits, dead blocks without gradients included, though hooks of the loop come before those of the library."""
    weights = []
    for in_backward in (False, True):
        model, sparsifier = made("magnitude")
        optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()}

        def step(parameter: Tensor, optimizers=optimizers) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        if in_backward:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)
        sparsifier.attach(list(optimizers.values()), total_steps=STEPS)
        for number in range(STEPS):
            loss_of(model, number).backward()
            if not in_backward:
                for parameter in model.parameters():
                    step(parameter)
        weights.append((model[0].weight.detach(), optimizers[model[0].weight].state[model[0].weight]["exp_avg"]))
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])


def test_torchs_own_optimisers_in_backward_are_refused_at_the_start():
    model, sparsifier = made()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    optimizers = [each for p in model.parameters() for each in p._in_backward_optimizers]
    with pytest.raises(KronblocksError, match=r"0 is stepped in backward.*register_post_accumulate_grad_hook"):
        sparsifier.attach(optimizers, total_steps=STEPS)


@pytest.mark.parametrize("set_to_none", [False, True])
def test_gradients_accumulated_over_the_lift(set_to_none):
    """Four backward passes a step, and buffers of gradients that are kept: as one pass with the whole batch."""
    results = []
    for parts in (1, 4):
        model, sparsifier = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier.attach(optimizer, total_steps=STEPS)
        for step in range(STEPS):
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(step))
            for part in x.chunk(parts):
                ((model(part) - part[:, :16].sin()).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        results.append(model[0].weight.detach())
    assert torch.allclose(*results, atol=1e-4)  # float32, other orders of summation over 30 steps
    assert torch.equal(results[0] == 0, results[1] == 0)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_and_clipping_by_a_kept_list(unscale):
    model, sparsifier = made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=STEPS)
    scaler, kept = torch.amp.GradScaler("cpu", init_scale=2.0**10), list(model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_value_(kept, 1e-3)
            assert all(float(p.grad.abs().max()) <= 1.001e-3 for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
    assert sparsifier.step == STEPS and zeros(model) == 0.75


def test_a_compiled_step_of_the_optimiser():
    model, sparsifier = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05))
    sparsifier.attach(optimizer, total_steps=STEPS)
    step = torch.compile(optimizer.step, backend="eager")
    moved = []
    for number in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, number).backward()
        before = model[0].weight.detach().clone()
        step()
        moved.append(not torch.equal(before, model[0].weight))
    assert all(moved) and sparsifier.step == STEPS and zeros(model) == 0.75


def test_an_average_that_holds_parameters_by_reference_is_no_silent_loss():
    """The list now holds the lifted values: what was averaged of the factors does not fit them, and torch says so."""
    model, sparsifier = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=STEPS)
    held = list(model.parameters())
    average = [p.detach().clone() for p in held]
    run(model, sparsifier, optimizer, until=16)
    with pytest.raises(RuntimeError):
        torch._foreach_lerp_(average, [p.detach() for p in held], 0.1)


# Hooks and tags on parameters


def clip(gradient: Tensor, largest: float = 1e-3) -> Tensor:
    return gradient.clamp(-largest, largest)


def registered(model: nn.Module, make: Callable[[], Callable[[Tensor], Tensor]]) -> list[Any]:
    return [p.register_hook(make()) for p in model.parameters()]


class Clipper:
    def clip(self, gradient: Tensor) -> Tensor:
        return clip(gradient)


CLIPPER = Clipper()


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip,
        lambda: lambda gradient: gradient.clamp(-1e-3, 1e-3),
        lambda: functools.partial(clip, largest=1e-3),
        lambda largest=float("1e-3"): lambda gradient: clip(gradient, largest),
        lambda: CLIPPER.clip,
    ],
    ids=["function", "lambda", "partial", "closure", "method"],
)
def test_hooks_on_all_factors_go_on_on_values_until_their_handles_remove_them(make):
    model, sparsifier = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handles = registered(model, make)
    sparsifier.attach(optimizer, total_steps=STEPS)

    def largest() -> float:
        model.zero_grad()
        (1000 * loss_of(model, 0)).backward()
        return max(float(p.grad.abs().max()) for p in model.parameters())

    for step in range(STEPS):
        assert largest() == pytest.approx(1e-3), step
        optimizer.step()
    for handle in handles:
        handle.remove()
    assert largest() > 1


def test_a_lift_without_an_optimiser_keeps_hooks_and_tags_too():
    model, _ = made()
    handles = registered(model, lambda: clip)
    model[0].coeff.tag = "mine"
    lift_(model)
    (1000 * loss_of(model, 0)).backward()
    assert model[0].values.tag == "mine" and float(model[0].values.grad.abs().max()) == pytest.approx(1e-3)
    for handle in handles:
        handle.remove()
    model.zero_grad()
    (1000 * loss_of(model, 0)).backward()
    assert float(model[0].values.grad.abs().max()) > 1


def test_hooks_on_one_factor_end_with_a_warning_at_attach_and_at_the_lift():
    model, sparsifier = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    handle = model[0].tiles.register_hook(clip)
    model[2].coeff.register_post_accumulate_grad_hook(lambda p: calls.append(tuple(p.shape)))
    with pytest.warns(KronblocksWarning, match=r"will end at the lift: clip on 0.tiles, <lambda> on 2.coeff.*on each of them"):
        sparsifier.attach(optimizer, total_steps=STEPS)
    shape = tuple(model[2].coeff.shape)
    with pytest.warns(KronblocksWarning, match=r"ended at the lift: clip on 0.tiles, <lambda> on 2.coeff"):
        run(model, sparsifier, optimizer)
    assert calls == [shape] * 11
    handle.remove()


def test_hooks_that_differ_by_parameter_are_told_apart():
    model, sparsifier = made()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: gradient)
        parameter.register_hook(functools.partial(clip, largest=float(parameter.dim())))
    with pytest.warns(KronblocksWarning, match="0.coeff"):
        sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1), total_steps=STEPS)


@pytest.mark.parametrize("method", ["packed", "magnitude"])
def test_hooks_of_any_kind_stay_where_no_lift_is(method):
    model, sparsifier = made(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = {"before": 0, "after": 0}
    weight = next(model[0].parameters())
    weight.tag = "mine"
    weight.register_hook(lambda _: calls.update(before=calls["before"] + 1))
    weight.register_post_accumulate_grad_hook(lambda _: calls.update(after=calls["after"] + 1))
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    assert calls == {"before": STEPS, "after": STEPS}
    assert next(model[0].parameters()) is weight and weight.tag == "mine"


def test_tags_on_weights_reach_factors_and_values_and_hooks_on_weights_are_warned_of():
    model = mlp(32, 32, 16)
    model[0].weight._no_weight_decay = True
    model[2].weight.register_hook(clip)
    with pytest.warns(KronblocksWarning, match=r"lack what the old ones had \(2: hooks on its weight\)"):
        sparsifier = sparsify_(model, SparsityConfig(block_size=4, rank=2, target_sparsity=0.75, measure_plans=False))
    assert model[0].coeff._no_weight_decay and model[0].tiles._no_weight_decay and not hasattr(model[0].bias, "_no_weight_decay")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer, total_steps=STEPS)
    run(model, sparsifier, optimizer)
    assert model[0].values._no_weight_decay


def test_frozen_factors_become_frozen_values():
    model, _ = made()
    model[0].coeff.requires_grad_(False)
    lift_(model)
    assert [layer.values.requires_grad for layer in free_layers(model)] == [False, True]
