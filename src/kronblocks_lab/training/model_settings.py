"""The settings that trainings and searches share: model, data and duration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError
from kronblocks.core.imports import import_here
from kronblocks_lab.data.text import fingerprint
from kronblocks_lab.training.decoder import HEAD, DecoderSize
from kronblocks_lab.training.models import TRANSFORMERS, ModelName
from kronblocks_lab.training.recipes import Recipe
from kronblocks_lab.training.threads import ThreadSettings

DataName = Literal["mnist5k", "fashion-mnist", "digits", "mnist", "cifar10", "cifar100", "text"]

_STEPS = 2000
_OF_MODELS: dict[str, tuple[str, ...]] = {
    "widths": ("mlp",),
    "image_size": TRANSFORMERS,
    **dict.fromkeys(("width", "depth", "heads", "context", "data_file", "steps"), ("decoder",)),
}
"""Settings that only some models have."""

_OF_IMAGES = ("train_images", "test_images", "data_dir", "fold")


def option(name: str) -> str:
    """The name of a setting on the command line."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class ModelAndData(ThreadSettings):
    """The settings that trainings and searches share: model, data and duration."""

    data: DataName = "mnist5k"
    """Data set; mnist5k, digits and text need no download."""
    model: ModelName = "mlp"
    widths: tuple[int, ...] = (512, 256)
    """Hidden sizes of the MLP."""
    width: int | None = None
    """Features of the decoder's residual stream; unset: 256."""
    depth: int | None = None
    """Blocks of the decoder; unset: 4."""
    heads: int | None = None
    """Attention heads of the decoder; unset: 4."""
    context: int | None = None
    """Characters that the decoder sees; unset: 128."""
    exclude: tuple[str, ...] | None = None
    """Patterns of layers to leave dense; unset: the decoder's output layer, and none of other models."""
    image_size: int | None = None
    """Pixels of a side to which vit-tiny, vit-base and swin-tiny scale the images; unset: 224."""
    train_images: int | None = None
    """Number of training images to use; unset: all."""
    test_images: int | None = None
    """Number of validation images, and of test images, to use; unset: all."""
    sparsity: float = SparsityConfig.target_sparsity
    """Share of the weights that ends in blocks of exact zeros."""
    epochs: int = 8
    """Of images: how often all are seen. Of text: how often the model is validated and saved during --steps."""
    steps: int | None = None
    """Optimiser steps of a training on text, a multiple of --epochs; unset: 2,000, or the next multiple."""
    batch_size: int | None = None
    """Images or windows of text in a step; unset: 256 images, or 16 windows."""
    lr: float | None = None
    """Learning rate of the dense parts; unset: the method's default."""
    data_dir: Path | None = None
    """Folder with the data set's original files."""
    data_file: Path | None = None
    """Text in UTF-8 for --data text; unset: the source of Python's standard library, as it is installed."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, for example one that calls register_method for a method of yours."""

    def __post_init__(self) -> None:
        self.import_plugins()
        ThreadSettings.__post_init__(self)
        for name in ("epochs", "batch_size", "train_images", "test_images", "steps", "width", "depth", "heads", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KronblocksError(f"{option(name)} must be at least 1, not {value}")
        for name in Recipe._fields:
            if getattr(self, name, None) is not None:  # searches have the learning rate only
                number(option(name), getattr(self, name), 0, math.inf, "a number from 0 on")
        self._check_model()

    def _check_model(self) -> None:
        if self.widths != ModelAndData.widths and self.model != "mlp":
            raise KronblocksError(f"--widths are the hidden layers of --model mlp: {self.model} has none to choose")
        if self.is_text != (self.data == "text"):
            text = "add --data text, with --data-file FILE for a text of yours" if self.is_text else "add --model decoder"
            raise KronblocksError(f"--model {self.model} cannot learn --data {self.data}: {text}")
        for name, models in _OF_MODELS.items():
            if getattr(self, name) != getattr(ModelAndData, name) and self.model not in models:
                raise KronblocksError(f"{option(name)} is for --model {', '.join(models)}, not {self.model}: leave it out")
        for name in _OF_IMAGES:
            if getattr(self, name, None) is not None and self.is_text:  # searches have no folds
                raise KronblocksError(f"{option(name)} is for images: leave it out with --data text")
        if self.is_text:
            self.decoder.check()
            if self.steps is not None and self.steps % self.epochs:
                near = max(1, round(self.steps / self.epochs)) * self.epochs
                raise KronblocksError(
                    f"--steps {self.steps} is no multiple of --epochs {self.epochs}, after each of which the model is validated: "
                    f"write --steps {near}, or other --epochs"
                )

    @property
    def is_text(self) -> bool:
        """Whether the model learns text."""
        return self.model == "decoder"

    @property
    def decoder(self) -> DecoderSize:
        """The decoder's sizes."""
        given = {name: getattr(self, name) for name in DecoderSize._fields}
        return DecoderSize(**{name: value for name, value in given.items() if value is not None})

    @property
    def samples(self) -> int:
        """Images or windows in a step."""
        return self.batch_size or (16 if self.is_text else 256)

    @property
    def steps_of_text(self) -> int:
        """Optimiser steps of a training on text between two validations."""
        return -(-(self.steps or _STEPS) // self.epochs)

    @property
    def left_dense(self) -> tuple[str, ...]:
        """Patterns of the layers that stay dense."""
        return ((HEAD,) if self.is_text else ()) if self.exclude is None else self.exclude

    def subject(self) -> dict[str, Any]:
        """Model, data and duration, complete, as plain values.

        Raises:
            KronblocksError: the text cannot be read.
        """
        sizes = self.decoder._asdict() if self.is_text else dict.fromkeys(DecoderSize._fields)
        return {
            "widths": list(self.widths),
            **sizes,
            "exclude": list(self.left_dense),
            "batch_size": self.samples,
            "steps": self.epochs * self.steps_of_text if self.is_text else None,
            "text": fingerprint(self.data_file) if self.is_text else None,
        }

    def import_plugins(self) -> None:
        """Import the user's modules, in each process of a training."""
        for name in self.plugins:
            try:
                import_here(name)
            except ImportError as error:
                raise KronblocksError(f"cannot import {name!r} of --plugins: {error}; write package.module") from error
