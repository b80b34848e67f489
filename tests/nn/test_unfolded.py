"""A convolution over patches is the convolution: outputs and all gradients in float64, whatever its settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronblocks import KronblocksError
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
