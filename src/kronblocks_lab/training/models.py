"""The dense models of the experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError

TransformerName = Literal["vit-tiny", "vit-base", "swin-tiny"]
ModelName = Literal["linear", "mlp", "lenet5"] | TransformerName | Literal["decoder"]
TRANSFORMERS: tuple[str, ...] = get_args(TransformerName)
IMAGE_SIZE = 224
"""Pixels of a side that the transformers of the paper see."""


def mlp(features: int, widths: Sequence[int], classes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    if any(width < 1 for width in widths):
        raise KronblocksError(f"widths are the sizes of the hidden layers, from 1 on, not {tuple(widths)}")
    layers: list[nn.Module] = [nn.Flatten()]
    for size, following in pairwise((features, *widths, classes)):
        layers += [nn.Linear(size, following), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def lenet5(image_shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """LeNet-5 with ReLU and max pooling; the first convolution is padded where images are smaller than 32x32.

    Source:
        LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
    """
    channels, height, width = image_shape
    if min(height, width) < 28:
        raise KronblocksError(f"lenet5 needs images of at least 28x28, not {height}x{width}: use --model mlp or another data set")
    padding = 2 if height < 32 else 0
    rows, cols = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * rows * cols, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


class ImageTransformer(nn.Module):
    """A classifier of the transformers library on images of another size: they are scaled first.

    Args:
        model: takes (N, C, size, size) images, gives an object with `logits` (N, classes).
        size: pixels of a side.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self._size = model, size

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self._size, self._size):
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


def build_model(
    name: ModelName,
    image_shape: tuple[int, int, int],
    classes: int,
    widths: Sequence[int] = (),
    image_size: int | None = None,
) -> nn.Module:
    """A model by name.

    Args:
        name: which.
        image_shape: (C, H, W) of the images.
        classes: outputs.
        widths: the MLP's hidden sizes.
        image_size: pixels of a side to which transformers scale images; None: 224, as in the paper.

    >>> sum(p.numel() for p in build_model("lenet5", (1, 28, 28), 10).parameters())
    61706
    """
    match name:
        case "linear":
            return mlp(math.prod(image_shape), (), classes)
        case "mlp":
            return mlp(math.prod(image_shape), widths, classes)
        case "lenet5":
            return lenet5(image_shape, classes)
        case "vit-tiny" | "vit-base" | "swin-tiny":
            return image_transformer(name, image_shape[0], classes, image_size or IMAGE_SIZE)
    raise KronblocksError(f"unknown model {name!r}: write linear, mlp, lenet5, {', '.join(TRANSFORMERS)}")
