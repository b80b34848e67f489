"""Convolutions with packed blocks: `packed_conv2d`, of stride 1, reads images in place; `packed_convolution` is for all strides.

The weight is (out_channels, kh * kw * channels): its columns are ordered by kernel position, then by channel, and a block stays
within one kernel position. Three custom operators, each the gradient of the others, as those of `kronblocks.ops.packed`. The
CPU's kernels copy no patches. Elsewhere these operators multiply patches, which take kh * kw times the input's memory meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.flop_counter import register_flop_formula

from kronblocks.core.errors import KronblocksError
from kronblocks.ops import backends
from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.index import NO_INDEX_GRADIENTS, BlockIndex
from kronblocks.ops.operands import autocast, check_product
from kronblocks.ops.operator import Operator, must_look
from kronblocks.ops.packed import packed_linear
from kronblocks.ops.pattern import refresh_index
from kronblocks.ops.strided import index_over_phases, over_phases, phases


def _packed_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
    kernel_height: int,
    kernel_width: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    dilation_height: int,
    dilation_width: int,
    look: bool = False,
) -> Tensor:
    if look:
        refresh_index(crow, values)
    index = BlockIndex(crow, col, row, slot, ccol, order)
    geometry = ConvGeometry(kernel_height, kernel_width, top, bottom, left, right, dilation_height, dilation_width)
    patches = geometry.patches(x)
    y = backends.pick(x).packed_linear(patches.flatten(0, 2), values, index, bias)
    return y.view(*patches.shape[:3], y.shape[1]).permute(0, 3, 1, 2).contiguous()


def _packed_conv2d_grad_input(
    dy: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
    kernel_height: int,
    kernel_width: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    dilation_height: int,
    dilation_width: int,
) -> Tensor:
    index = BlockIndex(crow, col, row, slot, ccol, order)
    geometry = ConvGeometry(kernel_height, kernel_width, top, bottom, left, right, dilation_height, dilation_width)
    rows = dy.permute(0, 2, 3, 1).contiguous()
    patches = backends.pick(dy).packed_grad_input(rows.flatten(0, 2), values, index)
    return geometry.joined(patches.view(*rows.shape[:3], patches.shape[1]))


def _packed_conv2d_grad_values(
    dy: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    row: Tensor,
    slot: Tensor,
    ccol: Tensor,
    order: Tensor,
    kernel_height: int,
    kernel_width: int,
    top: int,
    bottom: int,
    left: int,
    right: int,
    dilation_height: int,
    dilation_width: int,
) -> Tensor:
    index = BlockIndex(crow, col, row, slot, ccol, order)
    geometry = ConvGeometry(kernel_height, kernel_width, top, bottom, left, right, dilation_height, dilation_width)
    rows = dy.permute(0, 2, 3, 1).contiguous()
    return backends.pick(dy).packed_grad_values(rows.flatten(0, 2), geometry.patches(x).flatten(0, 2), index)


def _fake_conv(x, values, bias, crow, col, row, slot, ccol, order, *rest):
    geometry = ConvGeometry(*rest[:8])
    return x.new_empty(x.shape[0], (crow.shape[0] - 1) * values.shape[1], *geometry.result(*x.shape[2:]))


def _fake_grad_input(dy, values, crow, col, row, slot, ccol, order, *geometry):
    kernel = ConvGeometry(*geometry)
    channels = (ccol.shape[0] - 1) * values.shape[2] // kernel.positions
    return dy.new_empty(dy.shape[0], channels, *kernel.source(*dy.shape[2:]))


def _fake_grad_values(dy, x, crow, col, row, slot, ccol, order, *geometry):
    columns = x.shape[1] * ConvGeometry(*geometry).positions
    return dy.new_empty(col.shape[0], dy.shape[1] // (crow.shape[0] - 1), columns // (ccol.shape[0] - 1))


_NO_GRADIENTS = (*NO_INDEX_GRADIENTS, *(None for _ in ConvGeometry._fields))


def _save_conv(ctx, inputs, output):
    x, values, _, *index = inputs[:9]
    ctx.geometry = inputs[9:17]
    ctx.save_for_backward(x, values, *index)


def _save(ctx, inputs, output):
    ctx.geometry = inputs[8:]
    ctx.save_for_backward(*inputs[:8])


def _conv_backward(ctx, dy):
    x, values, *index = ctx.saved_tensors
    dx = _grad_input(dy, values, *index, *ctx.geometry) if ctx.needs_input_grad[0] else None
    dvalues = _grad_values(dy, x, *index, *ctx.geometry) if ctx.needs_input_grad[1] else None
    dbias = dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return dx, dvalues, dbias, *_NO_GRADIENTS, None


def _grad_input_backward(ctx, ddx):
    dy, values, *index = ctx.saved_tensors
    ddy = _conv(ddx, values, None, *index, *ctx.geometry, False) if ctx.needs_input_grad[0] else None
    dvalues = _grad_values(dy, ddx, *index, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return ddy, dvalues, *_NO_GRADIENTS


def _grad_values_backward(ctx, ddvalues):
    dy, x, *index = ctx.saved_tensors
    ddy = _conv(x, ddvalues, None, *index, *ctx.geometry, False) if ctx.needs_input_grad[0] else None
    dx = _grad_input(dy, ddvalues, *index, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return ddy, dx, *_NO_GRADIENTS


_conv = Operator("packed_conv2d", _packed_conv2d, fake=_fake_conv, save=_save_conv, backward=_conv_backward, differentiable=3)
_grad_input = Operator(
    "packed_conv2d_grad_input",
    _packed_conv2d_grad_input,
    fake=_fake_grad_input,
    save=_save,
    backward=_grad_input_backward,
    differentiable=2,
)
_grad_values = Operator(
    "packed_conv2d_grad_values",
    _packed_conv2d_grad_values,
    fake=_fake_grad_values,
    save=_save,
    backward=_grad_values_backward,
    differentiable=2,
)


def _conv_flops(x: Any, values: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(out_shape) // out_shape[1] * math.prod(values)


def _grad_input_flops(dy: Any, values: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(dy) // dy[1] * math.prod(values)


def _grad_values_flops(dy: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(dy) // dy[1] * math.prod(out_shape)


# so that torch's own counter does not report these products as nothing; exact where the index has no padding
register_flop_formula(torch.ops.kronblocks.packed_conv2d)(_conv_flops)
register_flop_formula(torch.ops.kronblocks.packed_conv2d_grad_input)(_grad_input_flops)
register_flop_formula(torch.ops.kronblocks.packed_conv2d_grad_values)(_grad_values_flops)


def packed_conv2d(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """The convolution of images with the weight that has the blocks `values` where `index` lists them, and is zero elsewhere.

    Args:
        x: (images, channels, H, W).
        values: (capacity, bm, bn), where bn divides the channels; slots that the index does not list do not count and get a
            gradient of exactly 0.
        index: where the live blocks of the (out_channels, kh * kw * channels) weight are.
        bias: (out_channels,) or None.
        geometry: kernel, padding and dilation.

    Returns:
        (images, out_channels, H', W'), contiguous.

    Raises:
        KronblocksError: shapes, dtypes or devices do not fit together, or the padded images are smaller than the kernel.
    """
    x, values, bias = autocast(x, values, bias)
    _check(x, values, index, bias, geometry)
    return _conv(x, values, bias, *index, *geometry, must_look())


def _check(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None, geometry: ConvGeometry) -> None:
    (m1, n1), (_, bm, bn) = index.grid, values.shape
    if x.dim() != 4 or n1 % geometry.positions:
        raise KronblocksError(
            f"x must be (images, channels, height, width), and its channels be blocks of {bn}, whose columns are {n1 * bn} for "
            f"{geometry.positions} kernel positions; x is {tuple(x.shape)}"
        )
    check_product(x.movedim(1, -1), n1 // geometry.positions, bn, bias, m1 * bm, {"values": values}, index.crow)
    if min(geometry.result(*x.shape[2:])) < 1:
        raise KronblocksError(f"images of {tuple(x.shape[2:])} are too small for {geometry}: add padding, or give larger ones")


def packed_convolution(x: Tensor, values: Tensor, index: BlockIndex, bias: Tensor | None, convolution: Convolution) -> Tensor:
    """The same for every stride; compiled code multiplies patches where stride is not 1 and the kernel not 1x1."""
    geometry, stride = convolution.geometry, convolution.stride
    if stride == (1, 1):
        return packed_conv2d(x, values, index, bias, geometry)
    if geometry.positions == 1:
        top, bottom, left, right = geometry.margins
        x = pad(x, (left, right, top, bottom))[:, :, :: stride[0], :: stride[1]]
        return packed_conv2d(x, values, index, bias, ConvGeometry(1, 1))
    if torch.compiler.is_compiling():  # an index over phases cannot be made there
        return convolution.over_patches(x, lambda rows: packed_linear(rows, values, index, bias))
    x, values, bias = autocast(x, values, bias)
    _check(x, values, index, bias, geometry)
    return packed_conv2d(phases(x, convolution), values, index_over_phases(index, convolution), bias, over_phases(convolution))
