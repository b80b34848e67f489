"""The models of the experiments, dense: `sparsify_` does the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from kronblocks.errors import KronblocksError

ModelName = Literal["linear", "mlp", "lenet5"]


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
        raise KronblocksError(f"lenet5 wants images of at least 28x28, not {height}x{width}: use --model mlp or another data set")
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


def build_model(name: ModelName, image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] = ()) -> nn.Sequential:
    """A model by name; `widths` are the MLP's hidden sizes.

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
    raise KronblocksError(f"unknown model {name!r}: write linear, mlp or lenet5")
