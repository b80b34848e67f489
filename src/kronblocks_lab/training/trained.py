"""The model of a finished training, built again from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks.core.limits import MOST_SIDE
from kronblocks.deploy.saving import CARD, from_pretrained, read_card
from kronblocks_lab.data.sets import limited, load_data
from kronblocks_lab.training.models import build_model

SHAPE, CLASSES = "image shape", "classes"
"""Words of a trained model's card by which it is built again."""


def trained_model(folder: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """The model of a finished training, and the shape of its images, (C, H, W).

    Raises:
        KronblocksError: the folder is none of a finished training.
    """
    if not (folder / "model" / CARD).exists():
        raise KronblocksError(f"{folder} holds no trained model: name a folder that kronblocks train has finished")
    words, settings = read_card(folder / "model")["metadata"], read_json(folder / "config.json")
    try:
        shape = tuple(int(side) for side in words[SHAPE].split("x"))
        channels, height, width = shape
        classes, widths = int(words[CLASSES]), settings["widths"]
        if not all(isinstance(size, int) and 0 < size <= MOST_SIDE for size in (*shape, classes, *widths)):
            raise ValueError(f"sizes beyond {MOST_SIDE:,}")
        model = build_model(settings["model"], (channels, height, width), classes, widths, settings["image_size"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KronblocksError(f"{folder} does not say how to build its model ({error!r}): train again") from error
    return from_pretrained(folder / "model", model), shape


def validation_accuracy(folder: Path, data_dir: Path | None = None) -> Callable[[nn.Module], float]:
    """A function from a model to its accuracy on the validation images of a training.

    Args:
        folder: of the training.
        data_dir: folder with the data set's original files; None: where `load_data` looks.

    Raises:
        KronblocksError: the folder does not say what they were, or they are not there.
    """
    settings = read_json(folder / "config.json")
    try:
        name, fold, *counts = (settings[key] for key in ("data", "fold", "train_images", "test_images"))
    except (KeyError, TypeError) as error:
        raise KronblocksError(f"{folder} does not say what its data was ({error!r}): train again") from error
    split = limited(load_data(name, data_dir=data_dir, fold=fold), *counts).validation

    def accuracy(model: nn.Module) -> float:
        batches = zip(split.images.split(1000), split.labels.split(1000), strict=True)
        with torch.no_grad():
            return sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches) / len(split)

    return accuracy
