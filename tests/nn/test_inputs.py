"""Inputs that nn.Linear takes and that are no ordinary tensors, other devices, and other ways to trace a model."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, SparsityConfig, sparsify_
from kronblocks.core import PerformanceWarning
from kronblocks.nn import BlockMixtureLinear
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.nn.unfolded import UnfoldedConv
from kronblocks.ops import BlockSize, kron_linear, packed_linear
from kronblocks.ops.index import BlockIndex


def as_linear(layer) -> nn.Linear:
    linear = nn.Linear(15, 12)
    with torch.no_grad():
        linear.weight.copy_(layer.dense_weight())
        linear.bias.copy_(layer.bias)
    return linear


def assert_close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # sums of at most 45 fp32 products


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(make, layout):
    layer = make.pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: nested tensors are in prototype stage
        x = torch.nested.nested_tensor([torch.randn(3, 15), torch.randn(5, 15)], layout=layout, requires_grad=True)
        y, wanted = layer(x), as_linear(layer)(x)
        assert y.is_nested and y.layout == layout
        for one, two in zip(y.unbind(), wanted.unbind(), strict=True):
            assert_close(one, two)
        if layout is torch.jagged:
            (y + wanted).values().sum().backward()  # the same ragged size, so that a residual connection works
            assert x.grad is not None


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors(make_any, layout):
    layer = make_any.pruned()
    dense = torch.randn(4, 15).relu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        x = dense.to_sparse(layout=layout)
    with pytest.warns(PerformanceWarning, match="sparse input is made dense"):
        y = layer(x)
    assert_close(y, layer(dense))


def test_fx_traces_a_layer_as_one_node(make):
    layer = make.pruned()
    model = nn.Sequential(layer, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(5, 15)
    assert torch.equal(traced(x), model(x))
    layer.scale_blocks_(torch.zeros(4, 3))
    assert torch.equal(traced(x), model(x)), "the traced model holds the layer"


def test_jit_trace_and_script(make):
    model, x = nn.Sequential(make.pruned(), nn.ReLU()), torch.randn(5, 15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sizes that are checked are noted as constants; scripting is deprecated
        assert_close(torch.jit.trace(model, (x,))(x), model(x))
        with pytest.raises(KronblocksError, match=r"torch.jit.script cannot compile .*: use torch.export.export"):
            torch.jit.script(model)


def test_a_layer_without_values(make):
    layer = make(device="meta")
    with pytest.raises(KronblocksError, match=r"has no values yet \(meta device\): load a state_dict"):
        layer(torch.randn(5, 15))
    with pytest.raises(KronblocksError, match=r"x is on meta"):
        make()(torch.randn(5, 15, device="meta"))


@pytest.mark.parametrize("buffers", [False, True])
def test_a_layer_that_is_partly_on_meta(make, buffers):
    """As offloading leaves it, or functional_call with half of a state."""
    layer, skeleton = make.pruned(), copy.deepcopy(make.pruned()).to("meta")
    state = dict(layer.named_buffers() if buffers else layer.named_parameters())
    with pytest.raises((KronblocksError, RuntimeError), match="meta"):
        torch.func.functional_call(skeleton, state, (torch.randn(5, 15),))
    with pytest.raises((KronblocksError, RuntimeError, NotImplementedError), match="meta"):
        layer.bias = nn.Parameter(torch.empty(12, device="meta"))
        layer(torch.randn(5, 15))


def test_norms_of_factors_on_two_devices(make_factors):
    layer = make_factors()
    layer.coeff = nn.Parameter(layer.coeff.detach().to("meta"))
    for call in (layer.block_norms, layer.dense_weight):
        with pytest.raises((KronblocksError, RuntimeError), match="meta"):
            call()


def test_a_model_that_was_made_block_sparse_on_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    sparsify_(model, SparsityConfig(block_size=8))
    with pytest.raises(KronblocksError, match="no values yet"):
        model(torch.randn(4, 64))


@pytest.mark.slow
def test_fake_tensors_and_tracing_with_them(make):
    from torch._subclasses import FakeTensorMode

    layer, x = make.pruned(), torch.randn(5, 15)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.randn(7, 15)).shape == (7, 12)
    for strict in (False, True):
        program = torch.export.export(layer, (x,), strict=strict)
        assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("x", [[[0.0] * 15] * 2, np.zeros((2, 15), np.float32), None], ids=["list", "array", "None"])
def test_what_is_no_tensor_is_refused(make, x):
    layer = make.pruned()
    for function in (layer, BlockMixtureLinear(15, 12, {"3x5": BlockSize(3, 5)}, rank=2)):
        with pytest.raises(KronblocksError, match=r"must be a tensor, not (list|ndarray|NoneType): write torch.as_tensor"):
            function(x)


def test_other_layers_and_operators_refuse_what_is_no_tensor():
    square = BlockSparseLinear(8, 8, 4)
    index = BlockIndex.from_mask(square.block_mask)
    functions = [
        BsrLinear.from_block_sparse(square),
        UnfoldedConv(nn.Conv2d(3, 4, 2)),
        lambda x: packed_linear(x, square.values, index),
        lambda x: kron_linear(x, torch.ones(2, 2, 1), torch.ones(1, 1, 4, 4), plan="dense"),
    ]
    for function in functions:
        with pytest.raises(KronblocksError, match="must be a tensor, not list"):
            function([[1.0] * 8])
