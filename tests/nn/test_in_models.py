"""Layers inside PyTorch's own modules, and compiled."""

import copy
import os
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from kronblocks import BlockSparseLinear, KroneckerBlockLinear

pytestmark = pytest.mark.slow


def kron(plan: str, **settings):
    return lambda n, m: KroneckerBlockLinear(n, m, "4x2", 2, plan=plan, **settings)


def free(plan: str):
    return lambda n, m: BlockSparseLinear(n, m, "4x2", plan=plan)


LAYERS = {
    **{f"kron-{plan}": kron(plan) for plan in ("dense", "tile_first", "coeff_first", "packed")},
    "kron-gate": kron("packed", tile_groups=1, gate=True),
    "free-dense": free("dense"),
    "free-packed": free("packed"),
}


def densified(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, KroneckerBlockLinear | BlockSparseLinear)
    assert layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
        linear.bias.copy_(layer.bias)
    return linear


def replace_feed_forward(encoder: nn.TransformerEncoderLayer, make) -> None:
    """linear1 and linear2 with blocks, two of them dead."""
    for name, sizes in (("linear1", (8, 12)), ("linear2", (12, 8))):
        layer = make(*sizes)
        mask = torch.ones(layer.grid.shape, dtype=torch.bool)
        mask[0, 1] = mask[1, 0] = False
        layer.set_block_mask_(mask)
        setattr(encoder, name, layer)


@pytest.fixture
def fast_path(monkeypatch) -> list[None]:
    """Grows whenever PyTorch takes its fused path, which reads `.weight` and never calls the layers."""
    calls: list[None] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: (calls.append(None), fused(*a, **k))[1])
    return calls


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_transformer_encoder_layer(make, fast_path):
    encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    replace_feed_forward(encoder, make)
    dense = copy.deepcopy(encoder)
    dense.linear1, dense.linear2 = densified(encoder.linear1), densified(encoder.linear2)
    x = torch.randn(3, 5, 8)

    def agree(modes):
        with modes():
            # fp32, normalised activations of size about 1, sums of at most 13 products
            torch.testing.assert_close(encoder(x), dense(x), rtol=1e-5, atol=1e-5)

    for modes in (torch.enable_grad, torch.no_grad):
        agree(modes)
    gradients = []
    for model in (encoder, dense):
        leaf = x.clone().requires_grad_()
        model(leaf).square().mean().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)  # as above through one more such sum and LayerNorm
    encoder.eval()
    dense.eval()
    agree(torch.enable_grad)
    assert not fast_path
    for modes in (torch.no_grad, torch.inference_mode):
        agree(modes)
    assert len(fast_path) == 2, "the dense model took the fused path both times, which would build the weights of the other"


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_functional_call_and_inference_mode(make):
    layer, x = make(8, 12), torch.randn(5, 8)
    doubled = {name: 2 * p.detach() for name, p in layer.named_parameters() if name in ("values", "coeff")}
    with torch.inference_mode():
        y = layer(x)
        twice = torch.func.functional_call(layer, doubled, x)
    torch.testing.assert_close(twice - layer.bias, 2 * (y - layer.bias), rtol=1e-5, atol=1e-5)  # fp32, 8 products
    torch.testing.assert_close(y, layer(x).detach(), rtol=0, atol=0)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def assert_compiles(layer: nn.Module, backend: str) -> None:
    """Forward, backward, and again after a step, without a graph break."""
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(2):
        x = torch.randn(2, 3, 8)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.square().sum().backward()
            results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)  # fp32, at most 48 products, fused or not
        with torch.no_grad():
            for parameter in layer.parameters():
                assert parameter.grad is not None
                parameter -= 0.01 * parameter.grad


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_compiled(make, fresh_compiler):
    assert_compiles(make(8, 12), "aot_eager")


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("kind", ["kron-tile_first", "free-packed"])
def test_compiled_by_inductor(kind, fresh_compiler):
    """Slow (a C++ compiler runs), so only one layer of factors and one of values."""
    assert_compiles(LAYERS[kind](8, 12), "inductor")


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_deaths_do_not_recompile(make, fresh_compiler, request):
    """A mask that changes every few steps must not reach the limit of 8 recompilations, where fullgraph fails."""
    layer, x = make(8, 12), torch.randn(5, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    compiled(x).sum().backward()
    for block in range(10):
        mask = layer.block_mask.clone()
        mask.view(-1)[block] = False
        layer.set_block_mask_(mask)
        y = compiled(x)
        y.sum().backward()
        torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-6)  # fp32, 8 products
    assert counter.frame_count <= 2, "once more with dynamic sizes, at most"


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_exported(make):
    """torch.export with any number of rows."""
    layer = make(8, 12)
    program = torch.export.export(layer, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))
    x = torch.randn(7, 8)
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-6)  # fp32, 8 products
