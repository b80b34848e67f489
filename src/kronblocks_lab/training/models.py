"""The dense models of the experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.training.vision import (
    IMAGE_SIZE,
    TRANSFORMERS,
    TransformerName,
    ViTSize,
    image_transformer,
    vit_of_size,
)

ModelName = Literal["linear", "mlp", "lenet5", "vit"] | TransformerName | Literal["decoder"]


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


def build_model(
    name: ModelName,
    image_shape: tuple[int, int, int],
    classes: int,
    widths: Sequence[int] = (),
    image_size: int | None = None,
    vit: ViTSize | None = None,
) -> nn.Module:
    """A classifier of images by name.

    Args:
        name: which.
        image_shape: (C, H, W) of the images.
        classes: outputs.
        widths: the MLP's hidden sizes.
        image_size: pixels of a side to which the paper's transformers scale images; None: 224, as there.
        vit: sizes of the model "vit", which sees images as they are.

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
        case "vit":
            return vit_of_size(image_shape, classes, vit or ViTSize())
    raise KronblocksError(f"unknown model {name!r}: write linear, mlp, lenet5, {', '.join(TRANSFORMERS)} or vit")
