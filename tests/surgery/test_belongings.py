"""What users have put on a layer before it is replaced: it goes on, or they are told that it does not."""

from __future__ import annotations

import warnings

import pytest
import torch
from tests.helpers import STEPS, config, mlp, run, started
from torch import nn

from kronblocks import KronblocksWarning, SparsityConfig, densify_, parameter_groups, sparsify_
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear

STATIC = SparsityConfig("static", 8, target_sparsity=0.5)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def patch(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda input: 2 * before(input)


def dispatch(layer: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))


KEPT_DENSE = [
    (patch, "its forward was replaced"),
    (dispatch, "its forward was replaced"),
    (lambda layer: layer.register_buffer("scale", torch.ones(1)), "scale"),
    (lambda layer: layer.register_parameter("adapter", nn.Parameter(torch.ones(1))), "adapter"),
]
PUT_ON = [
    (lambda layer: layer.register_state_dict_post_hook(lambda *_: None), "state_dict hooks"),
    (lambda layer: layer.register_state_dict_pre_hook(lambda *_: None), "state_dict hooks"),
    (lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None), "state_dict hooks"),
    (lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None), "state_dict hooks"),
    (lambda layer: layer.add_module("lora", nn.Identity()), "lora"),
    (lambda layer: layer.weight.register_hook(lambda gradient: gradient), "hooks on its weight"),
    (lambda layer: layer.weight.register_post_accumulate_grad_hook(lambda _: None), "hooks on its weight"),
]


@pytest.mark.parametrize(("put_on", "says"), PUT_ON)
def test_what_a_new_layer_lacks_is_named_once(put_on, says):
    net = model()
    for layer in (net[0], net[2]):
        put_on(layer)
    with pytest.warns(KronblocksWarning) as said:
        sparsify_(net, STATIC)
    (message,) = [str(each.message) for each in said]
    assert f"layers were replaced, and the new ones lack what the old ones had (0: {says}; 2: {says})" in message
    assert "after sparsify_" in message


@pytest.mark.parametrize(("put_on", "says"), KEPT_DENSE)
def test_a_layer_that_computes_something_else_with_it_is_left_as_it_is(put_on, says):
    net = model()
    put_on(net[0])
    kept = net[0]
    (left,) = sparsify_(net, STATIC).surgery.left_dense
    assert net[0] is kept and left.name == "0" and says in left.reason


@pytest.mark.parametrize(("put_on", "says"), [*PUT_ON, *KEPT_DENSE])
def test_layers_that_stay_what_they_are_lose_nothing(put_on, says):
    net = model()
    put_on(net[0])
    sparsify_(net, SparsityConfig("magnitude", 8))  # a warning would be an error
    net = model()
    put_on(net[0])
    sparsify_(net, SparsityConfig("static", 8, target_sparsity=0.5, exclude=("0",)))
    assert says


@pytest.mark.parametrize("method", ["static", "two-phase"])
def test_attributes_go_on_over_all_replacements(method):
    net = model()
    net[0].tag, net[0].__dict__["_is_hf_initialized"] = ["mine"], True
    tag = net[0].tag
    sparsifier = sparsify_(net, SparsityConfig(method, 8, target_sparsity=0.5, measure_plans=False))
    assert isinstance(net[0], BlockLayer) and net[0].tag is tag and net[0]._is_hf_initialized
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.01))
    sparsifier.attach(optimizer, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        net(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
    kept = set(vars(net[0])) - set(vars(type(net[0])(8, 8, 8, device="meta"))) - {"replaced_by"}
    assert net[0].tag is tag and kept == {"tag", "_is_hf_initialized"}
    densify_(net)
    assert type(net[0]) is nn.Linear and net[0].tag is tag
    assert set(vars(net[0])) == {*vars(nn.Linear(1, 1)), "tag", "_is_hf_initialized"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", ["two-phase", "kron-l1", "static"])
def test_nothing_is_missed_where_nobody_put_anything_on(first, bias):
    """Gates and biases that are there or not are the layers' own."""
    net = nn.Sequential(nn.Linear(32, 32, bias=bias), nn.Tanh(), nn.Linear(32, 32, bias=bias))
    sparsify_(net, SparsityConfig(first, 8, target_sparsity=0.5))
    sparsify_(net, SparsityConfig("rigl", 8, target_sparsity=0.75))  # a warning would be an error
    assert set(vars(net[0])) == set(vars(BlockSparseLinear(8, 8, 8, bias=bias, device="meta")))
    densify_(net)
    assert set(vars(net[0])) == set(vars(nn.Linear(1, 1)))


def test_a_forward_that_was_patched_after_sparsify_is_told_of_at_the_lift():
    net = model()
    sparsifier = sparsify_(net, SparsityConfig(block_size=8, target_sparsity=0.5, measure_plans=False))
    patch(net[2])
    optimizer = torch.optim.SGD(parameter_groups(net, lr=0.01))
    sparsifier.attach(optimizer, total_steps=20)
    with pytest.warns(KronblocksWarning, match=r"2: a replaced forward.*the lift has replaced"):
        for _ in range(20):
            optimizer.zero_grad()
            net(torch.randn(4, 32)).square().mean().backward()
            optimizer.step()


def test_convolutions_and_those_that_are_put_back():
    def conv() -> nn.Sequential:
        net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        for layer in net:
            layer.add_module("lora", nn.Identity())
            layer.tag = [layer]
        return net

    net = conv()
    with pytest.warns(KronblocksWarning, match=r"layers were replaced.*\(0: lora\)"):
        sparsify_(net, SparsityConfig("static", 4, target_sparsity=0.5, convolutions=True, exclude=("1",)))
    assert net[0].tag[0] is not net[0] and net[1].tag[0] is net[1] and "lora" in net[1]._modules
    net = conv()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="pattern"):
        warnings.simplefilter("error")
        sparsify_(net, SparsityConfig("static", 4, convolutions=True, layers=("none",)))
    assert all(layer.tag[0] is layer and "lora" in layer._modules for layer in net)


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
    run(model, sparsifier, optimizer, until=STEPS - 1)
    handle.remove()
    run(model, sparsifier, optimizer)
    assert calls == {"kept": STEPS, "removed": STEPS - 1}
