"""Convolutions of stride above 1 as convolutions of stride 1, so that they too read images in place.

Images are split into their phases: with stride 2 the even and the odd rows and columns become four images of a quarter of the
size, side by side as channels. A kernel position reads one phase. So the kernel over phases has fewer positions, each with more
channels, and the blocks of the same values have other columns. The rest of these columns has no blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

from kronblocks.ops.geometry import ConvGeometry, Convolution
from kronblocks.ops.index import BlockIndex

_KNOWN: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # crow: (its version, a reference to col, the convolution, the index over phases)


def over_phases(convolution: Convolution) -> ConvGeometry:
    """The convolution of stride 1 over phases; its images have no margins, since `phases` adds them."""
    geometry, (down, right) = convolution.geometry, convolution.stride
    height = (geometry.kernel_height - 1) * geometry.dilation_height // down + 1
    width = (geometry.kernel_width - 1) * geometry.dilation_width // right + 1
    return ConvGeometry(height, width)


def phases(x: Tensor, convolution: Convolution) -> Tensor:
    """(images, channels, H, W) -> (images, down * right * channels, H', W'), margins included, for results of the right size."""
    kernel, (down, right) = over_phases(convolution), convolution.stride
    top, _, left, _ = convolution.geometry.margins
    height, width = kernel.source(*convolution.result(*x.shape[2:]))
    x = pad(x, (left, width * right - left - x.shape[3], top, height * down - top - x.shape[2]))  # or cut what nobody reads
    split = x.unflatten(3, (width, right)).unflatten(2, (height, down))  # images, channels, height, down, width, right
    return split.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def index_over_phases(index: BlockIndex, convolution: Convolution) -> BlockIndex:
    """Where the same blocks are in the weight over phases. It is kept for as long as the index is."""
    if index.crow.is_inference():  # it does not tell whether it was written into
        return _index_over_phases(index, convolution)
    about: Any = (index.crow._version, convolution.geometry, convolution.stride)
    known = _KNOWN.get(index.crow)
    if known is not None and known[0] == about:
        return known[1]
    _KNOWN[index.crow] = about, (made := _index_over_phases(index, convolution))
    return made


@torch.no_grad()
@torch.inference_mode(False)
def _index_over_phases(index: BlockIndex, convolution: Convolution) -> BlockIndex:
    geometry, (down, right), kernel = convolution.geometry, convolution.stride, over_phases(convolution)
    (m1, n1), live = index.grid, int(index.crow[-1])
    channels = n1 // geometry.positions  # in blocks
    col, row, slot = (each[:live].long() for each in (index.col, index.row, index.slot))
    position, channel = col // channels, col % channels
    i = position // geometry.kernel_width * geometry.dilation_height
    j = position % geometry.kernel_width * geometry.dilation_width
    place = (i // down * kernel.kernel_width + j // right) * down * right + i % down * right + j % right
    columns = kernel.positions * down * right * channels
    mask = torch.zeros(m1 * columns, dtype=torch.bool, device=col.device)
    entries = row * columns + place * channels + channel
    mask[entries] = True
    nowhere = (~mask).nonzero().squeeze(1)[:1]  # for the slots of dead blocks
    positions = nowhere.expand(len(index.slot)).clone() if len(nowhere) else entries.new_zeros(len(index.slot))
    positions[slot] = entries
    return BlockIndex.from_mask(mask.view(m1, columns), positions)
