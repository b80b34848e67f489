"""The geometry of convolutions whose weight is (out_channels, kh * kw * channels): how images become rows of patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, fold, pad


class ConvGeometry(NamedTuple):
    """A convolution of stride 1 apart from its images: kernel, rows and columns of zeros around images, dilation."""

    kernel_height: int
    kernel_width: int
    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0
    dilation_height: int = 1
    dilation_width: int = 1

    def result(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for images of this size."""
        return height - self._lost[0], width - self._lost[1]

    def source(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the images that have results of this size."""
        return height + self._lost[0], width + self._lost[1]

    @property
    def positions(self) -> int:
        """Kernel positions."""
        return self.kernel_height * self.kernel_width

    @property
    def _lost(self) -> tuple[int, int]:
        reach = (self.kernel_height - 1) * self.dilation_height, (self.kernel_width - 1) * self.dilation_width
        return reach[0] - self.top - self.bottom, reach[1] - self.left - self.right

    @property
    def margins(self) -> tuple[int, int, int, int]:
        """Top, bottom, left, right."""
        return self[2:6]

    def patches(self, x: Tensor, stride: tuple[int, int] = (1, 1)) -> Tensor:
        """(images, channels, H, W) -> (images, H', W', kh * kw * channels)."""
        kh, kw, top, bottom, left, right, dh, dw = self
        x = pad(x, (left, right, top, bottom)).permute(0, 2, 3, 1)
        if (kh, kw) == (1, 1):
            return x[:, :: stride[0], :: stride[1]]
        windows = x.unfold(1, dh * (kh - 1) + 1, stride[0]).unfold(2, dw * (kw - 1) + 1, stride[1])[..., ::dh, ::dw]
        return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)  # from (images, H', W', channels, kh, kw)

    def joined(self, patches: Tensor) -> Tensor:
        """The transpose of `patches`: each number is added to where it was taken from."""
        kh, kw, top, bottom, left, right, dh, dw = self
        images, *size, columns = patches.shape
        height, width = self.source(*size)
        by_channel = patches.view(images, math.prod(size), kh * kw, columns // (kh * kw)).permute(0, 3, 2, 1).flatten(1, 2)
        padded = fold(by_channel, (height + top + bottom, width + left + right), (kh, kw), dilation=(dh, dw))
        return padded[:, :, top : top + height, left : left + width].clone(memory_format=torch.contiguous_format)


class Convolution(NamedTuple):
    """What surrounds a linear layer inside of a convolution.

    Args:
        geometry: kernel, padding and dilation.
        stride: rows and columns from one position to the next.
        size: height and width of the results; None: not known yet.
    """

    geometry: ConvGeometry
    stride: tuple[int, int] = (1, 1)
    size: tuple[int, int] | None = None

    def result(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the results for images of this size."""
        height, width = self.geometry.result(height, width)
        return (height - 1) // self.stride[0] + 1, (width - 1) // self.stride[1] + 1

    @property
    def positions(self) -> int:
        """Rows of patches for each image."""
        return math.prod(self._known_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the least images that have results of this size."""
        (height, width), (down, right) = self._known_size, self.stride
        height, width = self.geometry.source(1 + (height - 1) * down, 1 + (width - 1) * right)
        return max(1, height), max(1, width)

    @property
    def _known_size(self) -> tuple[int, int]:
        assert self.size is not None
        return self.size

    def numbers(self) -> list[int]:
        """All of it, in a list."""
        return [*self.geometry, *self.stride, *(self.size or ())]

    def kernel(self, weight: Tensor) -> Tensor:
        """Rearrange a weight, (out_channels, kh * kw * channels), to (out_channels, channels, kh, kw)."""
        kernel = self.geometry[:2]
        return weight.unflatten(1, (*kernel, weight.shape[1] // self.geometry.positions)).permute(0, 3, 1, 2).contiguous()

    def kernel_of(self, blocks: Tensor) -> Tensor:
        """Rearrange the blocks of a weight, (m1, n1, bm, bn) where bn divides the channels, as `kernel` does, in one copy."""
        split = blocks.unflatten(1, (*self.geometry[:2], -1))  # m1, kh, kw, channels / bn, bm, bn
        return split.permute(0, 4, 3, 5, 1, 2).flatten(2, 3).flatten(0, 1).contiguous()

    def convolve(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """Torch's convolution."""
        top, bottom, left, right = self.geometry.margins
        if (top, left) != (bottom, right):
            x, top, left = pad(x, (left, right, top, bottom)), 0, 0
        return conv2d(x, kernel, bias, self.stride, (top, left), self.geometry[6:])

    def over_patches(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """Copy patches, (images, H', W', kh * kw * channels), multiply these rows, and give (images, out_channels, H', W')."""
        return product(self.geometry.patches(x, self.stride)).permute(0, 3, 1, 2).contiguous()
