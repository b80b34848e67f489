"""What is done to training images and their labels: random crops, flips, mixup and label smoothing, on tensors."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Augmentation(NamedTuple):
    """What is done to a batch of training images; nothing by default.

    Source:
        Crops and flips as in He et al., "Deep residual learning for image recognition", 2016, section 4.2. Mixup: Zhang et
        al., "mixup: beyond empirical risk minimization", 2018. Label smoothing: Szegedy et al., "Rethinking the inception
        architecture for computer vision", 2016.
    """

    crop: int = 0  # pixels by which images are padded on each side, with the mean, and cut out again at a random place
    flip: bool = False  # mirror left and right, with probability 1/2
    mixup: float = 0.0  # parameter of the Beta distribution of the mixing share; 0: no mixing
    smoothing: float = 0.0  # share of a label that is spread evenly over all classes

    def __call__(self, images: Tensor, labels: Tensor, classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Other images, and shares of the classes where mixing or smoothing makes them of labels.

        Args:
            images: normalised, (N, C, H, W).
            labels: int64 (N,).
            classes: their number.
            generator: on the CPU; all draws come from it.

        Returns:
            Images (N, C, H, W), and labels (N,) or shares (N, classes).
        """
        if self.crop or self.flip:
            images = moved(images, self._offsets(len(images), generator), self._mirrored(len(images), generator), self.crop)
        if not self.mixup and not self.smoothing:
            return images, labels
        shares = nn.functional.one_hot(labels, classes).float()
        if self.mixup:
            order = torch.randperm(len(images), generator=generator).to(images.device)
            draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
            share = draw.betavariate(self.mixup, self.mixup)
            images = share * images + (1 - share) * images[order]
            shares = share * shares + (1 - share) * shares[order]
        return images, (1 - self.smoothing) * shares + self.smoothing / classes

    def _offsets(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2 * self.crop + 1, (number, 2), generator=generator)

    def _mirrored(self, number: int, generator: torch.Generator) -> Tensor:
        return (torch.rand(number, generator=generator) < 0.5) & self.flip


def moved(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Pieces of padded images, of the images' size, some of them mirrored.

    Args:
        images: (N, C, H, W).
        offsets: first row and first column in the padded image, int64 (N, 2), from 0 to twice the padding.
        mirrored: which pieces are mirrored left and right, bool (N,).
        padding: zeros on each side.
    """
    height, width = images.shape[-2:]
    offsets, mirrored = offsets.to(images.device), mirrored.to(images.device)
    along, down = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    columns = torch.where(mirrored[:, None], width - 1 - along, along) + offsets[:, 1:]  # (N, W)
    rows = down + offsets[:, :1]  # (N, H)
    padded = nn.functional.pad(images, [padding] * 4)
    numbers = torch.arange(len(images), device=images.device)[:, None, None]
    return padded[numbers, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
