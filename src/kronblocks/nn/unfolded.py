"""Layers with a linear layer inside: convolutions, and transformers' Conv1D (weight transposed)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.hooks import Onlooker
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.built import rearranged
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.nn.loading import WholeWeights
from kronblocks.ops.convolution import packed_convolution
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.operands import check_tensor


class Unfolded(WholeWeights):
    """Base class: a module that computes with the weight of `linear`, an ordinary linear layer that algorithms can replace.

    Attributes:
        linear: nn.Linear, or the block layer in its place.
        block_cols_divide: a number that the columns of a block must divide.
    """

    linear: Any
    block_cols_divide: int

    @property
    def weight(self) -> Tensor:
        """The weight in the layout of the original module, built at every access. Writing into it is an error."""
        raise NotImplementedError

    def folded(self) -> nn.Module:
        """The original kind of module, with the weight of `linear`."""
        raise NotImplementedError

    @property
    def _is_trained(self) -> bool:
        return any(p.requires_grad for name, p in self.linear.named_parameters(recurse=False) if name != "bias")


class UnfoldedConv(Unfolded):
    """A convolution as a linear layer over patches: the weight is (out_channels, kh * kw * in_channels).

    Columns are ordered by kernel position, then by input channel. So a block stays within one kernel position if its columns
    divide the input channels. If `linear` computes with a dense weight, torch's convolution runs. If it computes with its live
    blocks, `packed_conv2d` does, for stride 1 and for kernels of 1x1. Else patches are copied, which takes kh * kw times the
    input's memory: for other strides, for plans on factors, and while hooks watch the rows of `linear`.

    Args:
        conv: nn.Conv1d or nn.Conv2d with one group and zero padding. Its bias stays the same parameter.

    Raises:
        KronblocksError: another convolution; see `why_not`.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        if reason := self.why_not(conv):
            raise KronblocksError(reason)
        one = isinstance(conv, nn.Conv1d)
        self.one_dimensional = one
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = (
            _two(each, one, 1) for each in (conv.kernel_size, conv.stride, conv.dilation)
        )
        self.padding: Any = conv.padding if isinstance(conv.padding, str) else _two(conv.padding, one, 0)
        self.block_cols_divide = conv.in_channels
        self.linear = _linear(self.rows_of(conv.weight.detach()), conv.bias, conv.weight.requires_grad)
        self.train(conv.training)

    @staticmethod
    def why_not(conv: nn.Module) -> str:
        """Why a convolution cannot be unfolded; empty if it can."""
        if type(conv) not in (nn.Conv1d, nn.Conv2d):
            return f"{type(conv).__name__} is not nn.Conv1d or nn.Conv2d"
        if conv.groups != 1:
            return f"its {conv.groups} groups have small weights of their own"
        if conv.padding_mode != "zeros":
            return f"padding_mode={conv.padding_mode!r} is not supported"
        return ""

    def rows_of(self, weight: Tensor) -> Tensor:
        """Rearrange an ordinary convolution's weight for `linear`: (out_channels, kh * kw * in_channels)."""
        kernel = weight.unflatten(2, (1, -1)) if self.one_dimensional else weight
        return kernel.permute(0, 2, 3, 1).flatten(1)

    @property
    def weight(self) -> Tensor:
        size = self.kernel_size[1:] if self.one_dimensional else self.kernel_size
        return rearranged(self.linear.weight, self._folded_kernel, (self.out_channels, self.in_channels, *size))

    def _folded_kernel(self, weight: Tensor) -> Tensor:
        kernel = self._kernel(weight)
        return kernel.squeeze(2) if self.one_dimensional else kernel

    def folded(self) -> nn.Conv1d | nn.Conv2d:
        weight, bias = self.weight.detach().clone(), self.linear.bias
        last = slice(1, None) if self.one_dimensional else slice(None)
        kind: Any = nn.Conv1d if self.one_dimensional else nn.Conv2d
        conv = kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size[last],
            stride=self.stride[last],
            padding=self.padding if isinstance(self.padding, str) else self.padding[last],
            dilation=self.dilation[last],
            bias=bias is not None,
            device="meta",
            dtype=weight.dtype,
        )
        conv.weight = nn.Parameter(weight, requires_grad=self._is_trained)
        if bias is not None:
            conv.bias = bias
        return conv.train(self.training)

    def _kernel(self, weight: Tensor) -> Tensor:
        """Rearrange a weight of `linear` to (out_channels, in_channels, kh, kw)."""
        return self.convolution.kernel(weight)

    def forward(self, input: Tensor) -> Tensor:
        check_tensor(input)
        x = input.unsqueeze(-2) if self.one_dimensional else input
        batched = x.dim() == 4
        x = x if batched else x.unsqueeze(0)
        y = self._convolved(x)
        y = self._multiply_patches(x) if y is None else y
        y = y if batched else y.squeeze(0)
        return y.squeeze(-2) if self.one_dimensional else y

    def _convolved(self, x: Tensor) -> Tensor | None:
        """Convolve without rows for the linear layer; None if it has to be called, since it or a hook needs them."""
        linear: Any = self.linear
        before, after = linear._forward_pre_hooks.values(), linear._forward_hooks.values()
        if not all(isinstance(hook, Onlooker) for hook in (*before, *after)):
            return None
        dense = getattr(linear, "active_plan", "dense") == "dense" and hasattr(linear, "weight")
        packs = not dense and _computes_itself(linear) and isinstance(x, Tensor)
        operands = linear.packed_operands() if packs else None
        if not dense and operands is None:
            return None
        if before:
            rows = x[:, :1, :1, :1].expand(-1, 1, *self.convolution.result(*x.shape[2:])).permute(0, 2, 3, 1)
            for hook in before:
                hook(linear, (rows,), {})
        if operands is None:
            y = self._convolve(x)
        else:
            values, index = operands
            y = _laid_out_as(x, packed_convolution(x, values, index, linear.bias, self.convolution))
        for hook in after:
            hook(linear, (), y)
        return y

    @property
    def convolution(self) -> Convolution:
        """What surrounds the linear layer."""
        return Convolution(ConvGeometry(*self.kernel_size, *self._margins(), *self.dilation), self.stride)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "linear" and isinstance(value, BlockLayer):
            value.convolution = getattr(self.linear, "convolution", None) or self.convolution
        super().__setattr__(name, value)

    def _convolve(self, x: Tensor) -> Tensor:
        settings: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        bias: Any = self.linear.bias
        return nn.functional.conv2d(x, self._dense_kernel(), bias, **settings)

    def _dense_kernel(self) -> Tensor:
        """(out_channels, in_channels, kh, kw), for torch's convolution."""
        linear: Any = self.linear
        if isinstance(linear, BlockSparseLinear) and self.in_channels % linear.grid.block.cols == 0:
            return self.convolution.kernel_of(linear.dense_blocks())
        return self._kernel(linear.dense_weight() if isinstance(linear, BlockLayer) else linear.weight)

    def _multiply_patches(self, x: Tensor) -> Tensor:
        """Convolve over copied patches. The result has nn.Conv2d's memory layout (channels last if x is), so views work."""
        return _laid_out_as(x, self.linear(self._patches(x)).permute(0, 3, 1, 2))

    def _patches(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, H', W', kh * kw * C)."""
        return self.convolution.geometry.patches(x, self.stride)

    def _margins(self) -> tuple[int, int, int, int]:
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":
            (height, width) = (d * (k - 1) for k, d in zip(self.kernel_size, self.dilation, strict=True))
            return height // 2, height - height // 2, width // 2, width - width // 2
        height, width = self.padding
        return height, height, width, width

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


class Transposed(Unfolded):
    """transformers' Conv1D (in GPT-2): a linear layer whose weight is stored as (in_features, out_features).

    Args:
        conv: the Conv1D. Its bias stays the same parameter.
    """

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.block_cols_divide, self.nf = conv.nx, conv.nf
        self._kind = [type(conv)]  # in a list: it is no submodule
        self.linear = _linear(conv.weight.detach().t(), conv.bias, conv.weight.requires_grad)
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        return rearranged(self.linear.weight, Tensor.t, (self.block_cols_divide, self.nf))

    def folded(self) -> nn.Module:
        with torch.device("meta"):
            conv = self._kind[0](self.nf, self.block_cols_divide)
        weight = self.weight.detach().clone(memory_format=torch.contiguous_format)
        conv.weight = nn.Parameter(weight, requires_grad=self._is_trained)
        conv.bias = self.linear.bias
        return conv.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def unfolded(module: nn.Module, convolutions: bool) -> Unfolded | None:
    """Unfold a convolution (if asked) or a Conv1D of transformers; None for other modules."""
    if is_transposed(module):
        return Transposed(module)
    if convolutions and not UnfoldedConv.why_not(module):
        return UnfoldedConv(module)  # pyright: ignore[reportArgumentType]
    return None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D. transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _computes_itself(linear: nn.Module) -> bool:
    """Whether a block layer's own forward would be called, and nothing else beside it."""
    replaced = "forward" in vars(linear) or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear).forward in (BlockSparseLinear.forward, KroneckerBlockLinear.forward) and not replaced


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format that nn.Conv2d gives for x: channels last if x is."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _linear(weight: Tensor, bias: Any, requires_grad: bool) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad)
    if bias is not None:
        linear.bias = bias
    return linear


def _two(sizes: Any, one: bool, first: int) -> tuple[int, int]:
    return (first, *sizes) if one else tuple(sizes)
