"""Transformers that classify images: the paper's, and ViTs by size, with stochastic depth."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError

TransformerName = Literal["vit-tiny", "vit-base", "swin-tiny"]
TRANSFORMERS: tuple[str, ...] = get_args(TransformerName)
IMAGE_SIZE = 224
"""Pixels of a side that the transformers of the paper see."""


class ImageTransformer(nn.Module):
    """A classifier of the transformers library on images of another size: they are scaled first.

    Args:
        model: takes (N, C, size, size) images, gives an object with `logits` (N, classes).
        size: pixels of a side; None: images are never scaled.
    """

    def __init__(self, model: nn.Module, size: int | None) -> None:
        super().__init__()
        self.model, self._size = model, size

    def forward(self, images: Tensor) -> Tensor:
        if self._size is not None and images.shape[-2:] != (self._size, self._size):
            images = nn.functional.interpolate(images, (self._size, self._size), mode="bilinear", align_corners=False)
        return self.model(images).logits


def _fit_windows(swin: Any, side: int) -> None:
    """Windows no larger than the image, in the stages of a small one: transformers shrinks them, but not their position biases.

    Args:
        swin: the library's Swin.
        side: patches of a side in the first stage; each further one halves them.
    """
    for depth, stage in enumerate(swin.swin.encoder.layers):
        resolution = max(1, side // 2**depth)
        for layer in stage.blocks:
            if resolution < layer.window_size:
                bias = layer.attention.relative_position_bias
                heads = next(bias.parameters()).shape[1]
                layer.attention.relative_position_bias = type(bias)(heads, (resolution, resolution))
                layer.window_size, layer.shift_size = resolution, 0


def image_transformer(name: TransformerName, channels: int, classes: int, image_size: int = IMAGE_SIZE) -> ImageTransformer:
    """ViT-tiny, ViT-base or Swin-tiny, untrained; patches of 16 pixels (ViT) or 4 (Swin, and ViT below 128 pixels).

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", 2021; Touvron et al., "Training data-efficient image transformers",
        2021 (the tiny size); Liu et al., "Swin transformer", 2021. As in the paper, section 6.
    """
    from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

    if image_size < 32 or image_size % 4:
        raise KronblocksError(f"the image size is a multiple of 4 from 32 on, not {image_size}")
    shared: dict[str, Any] = {"image_size": image_size, "num_channels": channels, "num_labels": classes}
    if name == "swin-tiny":
        swin = SwinForImageClassification(SwinConfig(patch_size=4, **shared))
        _fit_windows(swin, image_size // 4)
        return ImageTransformer(swin, image_size)
    hidden, heads = (192, 3) if name == "vit-tiny" else (768, 12)
    patch = 16 if image_size >= 128 else 4
    if image_size % patch:
        raise KronblocksError(f"the image size of {name} is a multiple of {patch}, not {image_size}")
    config = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=12,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        patch_size=patch,
        **shared,
    )
    return ImageTransformer(ViTForImageClassification(config), image_size)


class ViTSize(NamedTuple):
    """Sizes of a ViT."""

    width: int = 192  # features of a token
    depth: int = 6
    heads: int = 3
    patch: int = 4  # pixels of a side


def vit_of_size(image_shape: tuple[int, int, int], classes: int, size: ViTSize) -> ImageTransformer:
    """A ViT for images as they are, untrained, with a class token; its MLPs are four times as wide as the tokens.

    Args:
        image_shape: (C, H, W).
        classes: outputs.
        size: see `ViTSize`.

    Raises:
        KronblocksError: the patch does not divide the image, or the heads the width.

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", 2021.
    """
    from transformers import ViTConfig, ViTForImageClassification

    channels, height, width = image_shape
    if height % size.patch or width % size.patch:
        raise KronblocksError(f"--patch {size.patch} does not divide images of {height}x{width}: write one that does")
    if size.width % size.heads:
        near = next(heads for heads in range(min(size.heads, size.width), 0, -1) if size.width % heads == 0)
        raise KronblocksError(f"--heads {size.heads} must divide --width {size.width}: for example --heads {near}")
    shared: dict[str, Any] = {"num_channels": channels, "num_labels": classes}
    config = ViTConfig(
        image_size=cast(Any, (height, width)),
        **shared,
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=4 * size.width,
        patch_size=size.patch,
    )
    return ImageTransformer(ViTForImageClassification(config), None)


class StochasticDepth(nn.Module):
    """Drops a residual branch of some samples in training, and scales the others so that the mean stays.

    Args:
        rate: probability of a drop.

    Source:
        Huang et al., "Deep networks with stochastic depth", 2016.

    >>> _ = torch.manual_seed(0)
    >>> sorted(set(StochasticDepth(0.5)(torch.ones(64, 1)).flatten().tolist()))
    [0.0, 2.0]
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return branch
        draws = torch.rand(len(branch), *[1] * (branch.dim() - 1))  # on the CPU, whose random state checkpoints hold
        kept = (draws >= self.rate).to(branch.device)
        return branch * kept / (1 - self.rate)


def drop_branches_(model: nn.Module, rate: float) -> None:
    """Give a ViT stochastic depth, with rates that rise evenly from 0 in its first block to `rate` in its last."""
    from transformers.models.vit.modeling_vit import ViTLayer

    layers = [module for module in model.modules() if isinstance(module, ViTLayer)]
    for number, layer in enumerate(layers):
        layer.dropout = cast(Any, StochasticDepth(rate * number / max(1, len(layers) - 1)))
