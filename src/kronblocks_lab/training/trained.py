"""The model of a finished training, built again from its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks.core.limits import MOST_LAYERS, MOST_SIDE
from kronblocks.deploy.saving import CARD, from_pretrained, read_card
from kronblocks_lab.data.sets import limited, load_data
from kronblocks_lab.data.text import all_windows, load_text
from kronblocks_lab.training.decoder import Decoder, DecoderSize
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.vision import ViTSize

SHAPE, CLASSES = "image shape", "classes"
"""Words of a trained classifier's card by which it is built again."""

VOCABULARY = "vocabulary"
"""Word of a language model's card, with its characters as a JSON text."""


Size = TypeVar("Size", DecoderSize, ViTSize)


class Trained(NamedTuple):
    """A finished training's model."""

    model: nn.Module
    shape: tuple[int, ...]  # of an input: (C, H, W) of an image, (T,) of a text
    vocabulary: str | None = None  # of a language model

    def example(self, rows: int) -> Tensor:
        """Random inputs: as many images, or windows of text with about as many characters."""
        generator = torch.Generator().manual_seed(0)
        if self.vocabulary is None:
            return torch.randn(rows, *self.shape, generator=generator)
        return torch.randint(len(self.vocabulary), (-(-rows // self.shape[0]), *self.shape), generator=generator)


def trained_model(folder: Path) -> Trained:
    """The model of a finished training.

    Raises:
        KronblocksError: the folder is none of a finished training.
    """
    if not (folder / "model" / CARD).exists():
        raise KronblocksError(f"{folder} holds no trained model: name a folder that kronblocks train has finished")
    words, settings = read_card(folder / "model")["metadata"], read_json(folder / "config.json")
    try:
        built = (_decoder if settings["model"] == "decoder" else _classifier)(words, settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KronblocksError(f"{folder} does not say how to build its model ({error!r}): train again") from error
    return built._replace(model=from_pretrained(folder / "model", built.model))


def _classifier(words: Mapping[str, str], settings: Mapping[str, Any]) -> Trained:
    shape = tuple(int(side) for side in words[SHAPE].split("x"))
    channels, height, width = shape
    classes, widths = int(words[CLASSES]), settings["widths"]
    _check(*shape, classes, *widths)
    vit = _sizes(ViTSize, settings) if settings["model"] == "vit" else None
    model = build_model(settings["model"], (channels, height, width), classes, widths, settings["image_size"], vit)
    return Trained(model, shape)


def _decoder(words: Mapping[str, str], settings: Mapping[str, Any]) -> Trained:
    size, vocabulary = _sizes(DecoderSize, settings), json.loads(words[VOCABULARY])
    if not isinstance(vocabulary, str):
        raise TypeError(f"a vocabulary of {type(vocabulary).__name__}")
    _check(len(vocabulary))
    return Trained(Decoder(len(vocabulary), size), (size.context,), vocabulary)


def _sizes(kind: type[Size], settings: Mapping[str, Any]) -> Size:
    size = kind(**{name: settings[name] for name in kind._fields})
    _check(*size)
    if size.depth > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS:,} blocks")
    return size


def _check(*sizes: int) -> None:
    if not all(isinstance(size, int) and 0 < size <= MOST_SIDE for size in sizes):
        raise ValueError(f"sizes beyond {MOST_SIDE:,}")


def validation_score(folder: Path, data_dir: Path | None = None, data_file: Path | None = None) -> Callable[[nn.Module], float]:
    """A function from a model to how well it does on the validation part of a training's data.

    Of classifiers it is the accuracy, of language models the loss in nats per character.

    Args:
        folder: of the training.
        data_dir: folder with the data set's original files; None: where `load_data` looks.
        data_file: the text; None: the standard library.

    Raises:
        KronblocksError: the folder does not say what they were, or they are not there.
    """
    settings = read_json(folder / "config.json")
    try:
        name, fold, *counts = (settings[key] for key in ("data", "fold", "train_images", "test_images"))
        if name == "text":
            return _text_loss(folder, settings, data_file)
    except (KeyError, TypeError) as error:
        raise KronblocksError(f"{folder} does not say what its data was ({error!r}): train again") from error
    if data_file is not None:
        raise KronblocksError(f"--data-file is for texts, and {folder} was trained on {name}: leave it out")
    split = limited(load_data(name, data_dir=data_dir, fold=fold), *counts).validation

    def accuracy(model: nn.Module) -> float:
        batches = zip(split.images.split(1000), split.labels.split(1000), strict=True)
        with torch.no_grad():
            return sum(int((model(x).argmax(1) == labels).sum()) for x, labels in batches) / len(split)

    return accuracy


def _text_loss(folder: Path, settings: Mapping[str, Any], data_file: Path | None) -> Callable[[nn.Module], float]:
    text = load_text(data_file, settings["context"])
    if text.source.sha256 != settings["text"]:
        raise KronblocksError(f"{folder} was trained on another text than {text.source.title}: name its file with --data-file")

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for x, labels in all_windows(text.validation):
            yield nn.functional.cross_entropy(model(x).flatten(0, 1).float(), labels.flatten(), reduction="none")

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            return float(torch.cat(list(losses(model))).double().mean())

    return loss
