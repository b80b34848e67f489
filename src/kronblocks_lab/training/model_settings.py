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
from kronblocks_lab.data.augment import Augmentation
from kronblocks_lab.data.text import source_of
from kronblocks_lab.training.decoder import HEAD, DecoderSize
from kronblocks_lab.training.models import ModelName
from kronblocks_lab.training.recipes import Recipe
from kronblocks_lab.training.threads import ThreadSettings
from kronblocks_lab.training.vision import TRANSFORMERS, ViTSize

DataName = Literal["mnist5k", "fashion-mnist", "digits", "mnist", "cifar10", "cifar100", "text"]

_STEPS = 2000
_SAMPLES = {"decoder": 16, "vit": 128}
_SIZES = tuple(dict.fromkeys((*DecoderSize._fields, *ViTSize._fields)))
_OF_MODELS: dict[str, tuple[str, ...]] = {
    "widths": ("mlp",),
    "image_size": TRANSFORMERS,
    "patch": ("vit",),
    "drop_path": ("vit", "vit-tiny", "vit-base"),
    **dict.fromkeys(("width", "depth", "heads"), ("decoder", "vit")),
    **dict.fromkeys(("context", "data_file", "steps"), ("decoder",)),
}
"""Settings that only some models have."""

_AUGMENTATION = {"crop": "crop", "flip": "flip", "mixup": "mixup", "smoothing": "label_smoothing"}
"""Fields of an `Augmentation` to settings."""
_OF_IMAGES = ("train_images", "test_images", "data_dir", "data_label", "fold", *_AUGMENTATION.values())

_OF_VIT: dict[str, Augmentation] = dict.fromkeys(("cifar10", "cifar100"), Augmentation(4, True, 0.2, 0.1))
_DROPPED = 0.1  # branches of its last block, on the same data


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
    """Features of the decoder's or the vit's tokens; unset: 256, or 192."""
    depth: int | None = None
    """Blocks of the decoder or the vit; unset: 4, or 6."""
    heads: int | None = None
    """Attention heads of the decoder or the vit; unset: one for 64 features."""
    patch: int | None = None
    """Pixels of a side of the vit's patches, which sees images as they are; unset: 4."""
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
    crop: int | None = None
    """Pixels of padding from which training images are cut out at random; unset: 0, or 4 for vit on CIFAR."""
    flip: bool | None = None
    """Mirror half of the training images; unset: False, or True for vit on CIFAR."""
    mixup: float | None = None
    """Mix pairs of training images, with shares from Beta(this, this); unset: 0 (none), or 0.2 for vit on CIFAR."""
    label_smoothing: float | None = None
    """Share of a training label that is spread over all classes; unset: 0, or 0.1 for vit on CIFAR."""
    drop_path: float | None = None
    """Stochastic depth: share of dropped branches in a ViT's last block; unset: 0, or 0.1 for vit on CIFAR."""
    sparsity: float = SparsityConfig.target_sparsity
    """Share of the weights that ends in blocks of exact zeros."""
    epochs: int = 8
    """Of images: how often all are seen. Of text: how often the model is validated and saved during --steps."""
    steps: int | None = None
    """Optimiser steps of a training on text, a multiple of --epochs; unset: 2,000, or the next multiple."""
    batch_size: int | None = None
    """Images or windows of text in a step; unset: 256 images (vit: 128), or 16 windows."""
    lr: float | None = None
    """Learning rate of the dense parts; unset: the method's default."""
    data_dir: Path | None = None
    """Folder with the data set's original files."""
    data_label: str | None = None
    """What the data is where it is not the original, such as "JPEG copies"; stands beside the numbers."""
    data_file: Path | None = None
    """Text in UTF-8 for --data text; unset: the source of Python's standard library, as it is installed."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, for example one that calls register_method for a method of yours."""

    def __post_init__(self) -> None:
        self.import_plugins()
        ThreadSettings.__post_init__(self)
        for name in ("epochs", "batch_size", "train_images", "test_images", "steps", *_SIZES):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KronblocksError(f"{option(name)} must be at least 1, not {value}")
        for name in Recipe._fields:
            if getattr(self, name, None) is not None:  # searches have the learning rate only
                number(option(name), getattr(self, name), 0, math.inf, "a number from 0 on")
        for name in ("label_smoothing", "drop_path"):
            if getattr(self, name) is not None:
                number(option(name), getattr(self, name), 0, 1, "a share from 0 to below 1")
        for name in ("crop", "mixup"):
            if getattr(self, name) is not None:
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
            DecoderSize(**self.model_sizes).check()
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
    def model_sizes(self) -> dict[str, int]:
        """The sizes of a model that has some to choose, by name: those of `DecoderSize` or of `ViTSize`."""
        kind = {"decoder": DecoderSize, "vit": ViTSize}.get(self.model)
        if kind is None:
            return {}
        sizes = {name: default if (own := getattr(self, name)) is None else own for name, default in kind()._asdict().items()}
        if self.heads is None:
            most = max(1, sizes["width"] // 64)
            sizes["heads"] = next((heads for heads in range(most, 0, -1) if sizes["width"] % (2 * heads) == 0), 1)
        return sizes

    @property
    def augmentation(self) -> Augmentation:
        """What is done to training images."""
        default = _OF_VIT.get(self.data, Augmentation()) if self.model == "vit" else Augmentation()
        given = {field: getattr(self, name) for field, name in _AUGMENTATION.items()}
        return default._replace(**{field: value for field, value in given.items() if value is not None})

    @property
    def dropped(self) -> float:
        """Share of dropped branches in a ViT's last block."""
        if self.drop_path is None:
            return _DROPPED if self.model == "vit" and self.data in _OF_VIT else 0.0
        return self.drop_path

    @property
    def samples(self) -> int:
        """Images or windows in a step."""
        return self.batch_size or _SAMPLES.get(self.model, 256)

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
        return {
            "widths": list(self.widths),
            **dict.fromkeys(_SIZES),
            **self.model_sizes,
            **dict(zip(_AUGMENTATION.values(), self.augmentation, strict=True)),
            "drop_path": self.dropped,
            "exclude": list(self.left_dense),
            "batch_size": self.samples,
            "steps": self.epochs * self.steps_of_text if self.is_text else None,
            "text": source_of(self.data_file).sha256 if self.is_text else None,
        }

    def import_plugins(self) -> None:
        """Import the user's modules, in each process of a training."""
        for name in self.plugins:
            try:
                import_here(name)
            except ImportError as error:
                raise KronblocksError(f"cannot import {name!r} of --plugins: {error}; write package.module") from error
