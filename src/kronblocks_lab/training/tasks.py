"""What a training or a search learns: images or a text, in seeded batches, and the model for them."""

from __future__ import annotations

import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kronblocks_lab.data.seeds import generator_of
from kronblocks_lab.data.sets import BatchSampler, limited, load_data, loader
from kronblocks_lab.data.text import WindowSampler, all_windows, load_text, random_windows
from kronblocks_lab.training.decoder import Decoder, DecoderSize
from kronblocks_lab.training.model_settings import ModelAndData
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.trained import CLASSES, SHAPE, VOCABULARY
from kronblocks_lab.training.vision import ViTSize, drop_branches_

_EVALUATED = 1000  # images in a batch of an evaluation


class Task(ABC):
    """Data in three parts and the model that learns them; batches are [inputs, labels].

    Attributes:
        vocabulary: characters of a text; None of images.
        source: what the data is, for people.
        example: two inputs.
        card: words by which `trained_model` builds the model again.
        epochs: of the training.
        epoch_steps: optimiser steps of an epoch.
        whole_epoch: optimiser steps in which all images are seen, or those between two validations of a text.
    """

    vocabulary: str | None = None
    source: dict[str, Any]
    example: Tensor
    card: dict[str, str]
    epoch_steps: int

    def __init__(self, config: ModelAndData) -> None:
        self.config, self.epochs = config, config.epochs

    @property
    @abstractmethod
    def whole_epoch(self) -> int:
        """See the class."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training."""
        return self.epochs * self.epoch_steps

    @abstractmethod
    def model(self) -> nn.Module:
        """A new dense model, drawn from torch's global random state."""

    @abstractmethod
    def train_batches(self, seed: int) -> DataLoader:
        """Training batches in an order that seed and epoch decide."""

    @abstractmethod
    def validation_batches(self) -> DataLoader:
        """The validation part."""

    @abstractmethod
    def test_batches(self) -> DataLoader:
        """The test part."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of each sample, (N,)."""

    def augmented(self, batch: list[Tensor], seed: int, epoch: int, number: int) -> list[Tensor]:
        """A training batch as the model sees it, drawn from seed, epoch and its number and nothing else."""
        return batch

    def endless_batches(self, seed: int) -> Iterator[list[Tensor]]:
        """The training batches as the model sees them, epoch after epoch."""
        batches = self.train_batches(seed)
        sampler: Any = batches.sampler
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for number, batch in enumerate(batches):
                yield self.augmented(batch, seed, epoch, number)


class ImageTask(Task):
    """Classification of images."""

    def __init__(self, config: ModelAndData, fold: int | None = None) -> None:
        super().__init__(config)
        data = load_data(config.data, data_dir=config.data_dir, fold=fold)
        self._data = limited(data, config.train_images, config.test_images)
        self.source = {"title": config.data if config.data_label is None else f"{config.data} ({config.data_label})"}
        self.example = self._data.train.images[:2]
        self.card = {SHAPE: "x".join(map(str, self._data.image_shape)), CLASSES: str(self._data.classes)}
        self.epoch_steps = self.whole_epoch

    @property
    def whole_epoch(self) -> int:
        return math.ceil(len(self._data.train) / self.config.samples)

    def model(self) -> nn.Module:
        config = self.config
        vit = ViTSize(**config.model_sizes) if config.model == "vit" else None
        model = build_model(config.model, self._data.image_shape, self._data.classes, config.widths, config.image_size, vit)
        if config.dropped:
            drop_branches_(model, config.dropped)
        return model

    def augmented(self, batch: list[Tensor], seed: int, epoch: int, number: int) -> list[Tensor]:
        images, labels = batch
        return [*self.config.augmentation(images, labels, self._data.classes, generator_of(seed, epoch, number))]

    def train_batches(self, seed: int) -> DataLoader:
        return loader(self._data.train, BatchSampler(len(self._data.train), self.config.samples, seed))

    def validation_batches(self) -> DataLoader:
        split = self._data.validation
        return loader(split, BatchSampler(len(split), _EVALUATED, 0, shuffle=False))

    def test_batches(self) -> DataLoader:
        return loader(self._data.test, BatchSampler(len(self._data.test), _EVALUATED, 0, shuffle=False))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, labels, reduction="none")


class TextTask(Task):
    """Prediction of the next character of a text; a sample is a window of `--context` characters."""

    def __init__(self, config: ModelAndData) -> None:
        super().__init__(config)
        self.size = DecoderSize(**config.model_sizes)
        self.text = load_text(config.data_file, self.size.context)
        text, self.vocabulary = self.text, self.text.vocabulary
        self.source = {**text.source._asdict(), "vocabulary": len(text.vocabulary)}
        self.source |= {part: len(getattr(text, part).codes) for part in ("train", "validation", "test")}
        self.example = text.train.windows(torch.arange(2))[0]
        self.card = {VOCABULARY: json.dumps(text.vocabulary), "text": str(text.source)}
        self.epoch_steps = config.steps_of_text

    @property
    def whole_epoch(self) -> int:
        return self.config.steps_of_text

    def model(self) -> nn.Module:
        return Decoder(len(self.text.vocabulary), self.size)

    def train_batches(self, seed: int) -> DataLoader:
        sampler = WindowSampler(self.text.train.starts, self.config.samples, self.epoch_steps, seed)
        return random_windows(self.text.train, sampler)

    def validation_batches(self) -> DataLoader:
        return all_windows(self.text.validation)

    def test_batches(self) -> DataLoader:
        return all_windows(self.text.test)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def task_of(config: ModelAndData, fold: int | None = None) -> ImageTask | TextTask:
    """Load what a training or a search learns.

    Args:
        config: of the training or search.
        fold: of cross-validation, see `load_data`.

    Raises:
        KronblocksError: the data cannot be read, or does not fit the settings.
    """
    return TextTask(config) if config.is_text else ImageTask(config, fold)
