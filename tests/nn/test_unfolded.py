"""A convolution over patches is the convolution: outputs and all gradients in float64, whatever its settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kronblocks import BlockSparseLinear, KronblocksError, KroneckerBlockLinear
from kronblocks.nn.bsr_linear import BsrLinear
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks.nn.unfolded import Transposed, UnfoldedConv, unfolded

CONVS = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
    "uneven": lambda: nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "1x1": lambda: nn.Conv2d(8, 6, 1, stride=2),
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "1d dilated": lambda: nn.Conv1d(4, 6, 3, dilation=2, padding="same"),
}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("name", CONVS)
def test_it_is_the_convolution(name, patches, batched):
    torch.manual_seed(0)
    conv = CONVS[name]().double()
    new = UnfoldedConv(conv)
    if patches:
        new.linear.register_forward_hook(lambda *_: None)
    size = (9,) if isinstance(conv, nn.Conv1d) else (9, 8)
    x = torch.randn(*((2,) if batched else ()), conv.in_channels, *size, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = new(ours), conv(theirs)
    assert torch.allclose(y, expected, atol=1e-12)
    dy = torch.randn_like(y)
    y.backward(dy)
    bias_gradient = None if new.linear.bias is None else new.linear.bias.grad.clone()
    if conv.bias is not None:
        conv.bias.grad = None  # it is the same parameter
    expected.backward(dy)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)
    kernel = new._kernel(new.linear.weight.grad)
    assert torch.allclose(kernel.squeeze(2) if isinstance(conv, nn.Conv1d) else kernel, conv.weight.grad, atol=1e-12)
    assert bias_gradient is None or torch.allclose(bias_gradient, conv.bias.grad, atol=1e-12)
    again = new.folded()
    assert torch.equal(again.weight, conv.weight) and again.bias is conv.bias
    assert str(again) == str(conv)


def packed(conv: nn.Module, kind: str) -> UnfoldedConv:
    """With live blocks of about half of the weight in its place."""
    new = UnfoldedConv(conv)  # pyright: ignore[reportArgumentType]
    columns = new.in_channels // 2 if new.in_channels % 2 == 0 else new.in_channels
    sizes = (new.linear.in_features, new.linear.out_features, (1, columns))
    if kind == "values":
        layer = BlockSparseLinear(
            *sizes, mask=torch.rand(sizes[1], sizes[0] // columns) < 0.5, plan="packed", dtype=torch.float64
        )
    else:
        layer = KroneckerBlockLinear(*sizes, rank=2, gate=True, plan="packed", dtype=torch.float64)
        layer.set_block_mask_(torch.rand(layer.grid.shape) < 0.5)
    layer.bias = new.linear.bias
    new.linear = layer
    return new


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["values", "factors"])
@pytest.mark.parametrize("name", CONVS)
def test_live_blocks_give_what_their_weight_gives(name, kind, last):
    """In place, over patches (hooks watch the rows), and by torch: outputs, all gradients, and the layout in memory."""
    torch.manual_seed(0)
    conv = CONVS[name]().double()
    new = packed(conv, kind)
    x = torch.randn(2, conv.in_channels, *((9,) if isinstance(conv, nn.Conv1d) else (9, 8)), dtype=torch.float64)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    dy, results, strides = torch.randn_like(conv(x)), [], []
    for way in ("in place", "patches", "dense"):
        handle = new.linear.register_forward_hook(lambda *_: None) if way == "patches" else None
        new.linear.use_plan_("dense" if way == "dense" else "packed")
        leaf = x.clone().requires_grad_()
        y = new(leaf)
        wanted = [leaf, *new.linear.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, dy)])
        strides.append(y.stride())
        if handle is not None:
            handle.remove()
    for ours, expected in zip(zip(*results[:2], strict=True), results[2], strict=True):
        for each in ours:
            torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10)  # float64 sums in another order
    assert strides[0] == strides[1] == conv(x).stride()


@pytest.mark.parametrize("kind", ["values", "factors"])
def test_patches_are_copied_only_where_somebody_needs_rows(kind, monkeypatch):
    new, x = packed(nn.Conv2d(4, 6, 3, padding="same").double(), kind), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    copied: list[int] = []
    patches = UnfoldedConv._patches
    monkeypatch.setattr(UnfoldedConv, "_patches", lambda self, x: copied.append(1) or patches(self, x))
    expected = new(x)
    assert not copied
    with torch.autocast("cpu", torch.bfloat16):
        assert copy.deepcopy(new).float()(x.float()).dtype == torch.bfloat16
    assert not copied
    handle = new.linear.register_full_backward_hook(lambda *_: None)
    torch.testing.assert_close(new(x.requires_grad_()), expected, rtol=1e-10, atol=1e-10)
    assert len(copied) == 1
    handle.remove()
    new.linear.forward = lambda rows: 2 * rows @ new.linear.weight.T
    assert not torch.allclose(new(x), expected) and len(copied) == 2


@pytest.mark.parametrize("make", [BsrLinear.from_block_sparse, QuantizedBlockLinear.from_packed])
def test_layers_for_inference_get_rows(make):
    conv = nn.Conv2d(4, 8, 3, padding=1)
    new = UnfoldedConv(conv)
    layer = BlockSparseLinear.from_dense(new.linear, block_size=2, mask=torch.rand(4, 18) < 0.5)
    new.linear = layer
    x = torch.randn(2, 4, 5, 6)
    expected = new(x).detach()
    new.linear = make(layer)
    called: list[int] = []
    forward = new.linear.forward
    new.linear.forward = lambda rows: called.append(1) or forward(rows)
    assert (new(x) - expected).abs().max() < 0.02 * expected.abs().max() and called  # int8: a part in 127 of the largest


def test_a_layer_without_a_weight_gets_rows():
    """As that of factors in an ONNX file."""
    new = UnfoldedConv(nn.Conv2d(4, 8, 3))
    expected, linear = new(x := torch.randn(2, 4, 5, 6)), new.linear
    new.linear = nn.Sequential(linear)
    torch.testing.assert_close(new(x), expected, rtol=1e-5, atol=1e-5)  # 36 products in another order


def test_they_follow_their_mask_in_compiled_code():
    new, x = packed(nn.Conv2d(4, 6, 3, padding=1).double(), "values"), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(new, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        gradients = []
        for function in (compiled, new):
            y = function(x)
            gradients.append([y.detach(), *torch.autograd.grad(y.square().sum(), [*new.linear.parameters()])])
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        new.linear.block_mask[0] = False  # without a method of the layer
    torch.compiler.reset()


def test_what_cannot_be_unfolded_says_why():
    for conv, says in (
        (nn.Conv2d(4, 4, 3, groups=2), "2 groups"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d"),
        (nn.Conv3d(4, 4, 3), "Conv3d"),
    ):
        with pytest.raises(KronblocksError, match=says):
            UnfoldedConv(conv)
        assert unfolded(conv, convolutions=True) is None
    assert unfolded(nn.Conv2d(4, 4, 3), convolutions=False) is None


def test_the_conv1d_of_transformers_is_a_linear_layer_with_its_weight_transposed():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(6, 4)
    new = unfolded(conv, convolutions=False)
    assert isinstance(new, Transposed) and new.linear.bias is conv.bias
    x = torch.randn(2, 3, 4)
    assert torch.allclose(new(x), conv(x), atol=1e-6)
    again = new.folded()
    assert type(again) is Conv1D and torch.equal(again.weight, conv.weight) and torch.equal(again(x), conv(x))
