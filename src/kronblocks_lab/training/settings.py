"""The settings of `kronblocks train` and `compare`, and each method's recipe."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from kronblocks.config.methods import Method, spec_of
from kronblocks.config.parts import BlockSettings, MethodChoice, MethodSettings, Mismatch
from kronblocks.config.sparsity import PenaltyConfig, ScheduleConfig, SparsityConfig
from kronblocks.core.blocks import BlockSize
from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError
from kronblocks.core.imports import import_here
from kronblocks.search.config import Goal
from kronblocks_lab.training.models import TRANSFORMERS, ModelName
from kronblocks_lab.training.recipes import (
    OF_FREE_VALUES,
    OF_SOME_METHODS,
    Recipe,
    has_setting,
    recipe_of,
)
from kronblocks_lab.training.threads import ThreadSettings

RESULT_VERSION = 2
"""Version of result.json. From 2 on, inference multiply-adds do not count zero blocks."""

DataName = Literal["mnist5k", "fashion-mnist", "digits", "mnist", "cifar10", "cifar100"]


def option(name: str) -> str:
    """The name of a setting on the command line."""
    return f"--{name.replace('_', '-')}"


def part_of_a_file_name(flag: str, value: str) -> None:
    """Raise KronblocksError for a value that a file's name should not contain."""
    if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_-]*", value):
        raise KronblocksError(f"{flag} becomes part of a file's name: write letters, digits, - and _, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelAndData(ThreadSettings):
    """The settings that trainings and searches share: model, data and duration."""

    data: DataName = "mnist5k"
    """Data set; mnist5k and digits need no download."""
    model: ModelName = "mlp"
    widths: tuple[int, ...] = (512, 256)
    """Hidden sizes of the MLP."""
    image_size: int | None = None
    """Pixels of a side to which vit-tiny, vit-base and swin-tiny scale the images; unset: 224."""
    train_images: int | None = None
    """Number of training images to use; unset: all."""
    test_images: int | None = None
    """Number of validation images, and of test images, to use; unset: all."""
    sparsity: float = SparsityConfig.target_sparsity
    """Share of the weights that ends in blocks of exact zeros."""
    epochs: int = 8
    batch_size: int = 256
    lr: float | None = None
    """Learning rate of the dense parts; unset: the method's default."""
    data_dir: Path | None = None
    """Folder with the data set's original files."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, for example one that calls register_method for a method of yours."""

    def __post_init__(self) -> None:
        self.import_plugins()
        ThreadSettings.__post_init__(self)
        for name in ("epochs", "batch_size", "train_images", "test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KronblocksError(f"{option(name)} must be at least 1, not {value}")
        for name in Recipe._fields:
            if getattr(self, name, None) is not None:  # searches have the learning rate only
                number(option(name), getattr(self, name), 0, math.inf, "a number from 0 on")
        if self.model != "mlp" and self.widths != ModelAndData.widths:
            raise KronblocksError(f"--widths are the hidden layers of --model mlp: {self.model} has none to choose")
        if self.model not in TRANSFORMERS and self.image_size is not None:
            raise KronblocksError(f"--image-size is for {', '.join(TRANSFORMERS)}: {self.model} uses the images as they are")

    def import_plugins(self) -> None:
        """Import the user's modules, in each process of a training."""
        for name in self.plugins:
            try:
                import_here(name)
            except ImportError as error:
                raise KronblocksError(f"cannot import {name!r} of --plugins: {error}; write package.module") from error


@dataclass(frozen=True, kw_only=True)
class TaskConfig(MethodSettings, BlockSettings, ModelAndData):
    """The settings that `train` and `compare` share."""

    out: Path
    """Folder for the results; must be new or empty, unless --resume."""
    fold: int | None = None
    """Cross-validation: which fifth of the training images is for validation, 0 to 4; unset: a fixed tenth of them."""
    candidates: tuple[str, ...] | None = None
    """Candidates of --block-size auto, such as 4 8 16x4; unset: squares with sides 2, 4, ... 64."""
    goal: Goal = "step-time"
    """With --block-size auto: what to minimise among candidates that lose nothing."""
    weight_decay: float | None = None
    """Weight decay of dense weights; unset: the method's default."""
    factor_weight_decay: float | None = None
    """Weight decay of factors, and of free block values; unset: the method's default."""
    factor_lr_scale: float | None = None
    """Learning rate of factors, relative to --lr; unset: the method's default."""
    tile_lr_scale: float | None = None
    """Learning rate of tiles, relative to that of the other factors; unset: 1."""
    lifted_lr_scale: float | None = None
    """Learning rate of free block values, relative to --lr; unset: the method's default."""
    lifted_weight_decay: float | None = None
    """Weight decay of free block values; unset: --factor-weight-decay."""
    on_mismatch: Mismatch = "nearest"  # 10 outputs cannot have blocks of 16 rows
    start_from: Path | None = None
    """Folder of a finished training, to start from its weights. The default of --init is then nearest."""
    distill: float | None = None
    """Share of the distance to that model's outputs in the loss, 0 to 1; unset: use the labels only."""
    resume: bool = False
    """Go on from the last checkpoint in the folder."""
    progress: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        ModelAndData.__post_init__(self)
        MethodSettings.__post_init__(self)
        BlockSettings.__post_init__(self)
        if self.distill is not None and self.start_from is None:
            raise KronblocksError("--distill learns from a trained model: name its folder with --start-from")
        if self.distill is not None and not 0 <= self.distill <= 1:
            raise KronblocksError(f"--distill is the share of the trained model in the loss, 0 to 1, not {self.distill}")
        if self.block_size != "auto" and (self.candidates is not None or self.goal != "step-time"):
            raise KronblocksError(f"--candidates and --goal are for --block-size auto, not {self.block_size}")
        if self.candidates is not None and not self.candidates:
            raise KronblocksError("--candidates names no block size: write at least two, such as 4 8 16x4, or leave it out")
        for size in self.candidates or ():
            BlockSize.parse(size)
        if self.start_from is not None and self.block_size == "auto":
            raise KronblocksError("--block-size auto searches with new models: name a size with --start-from")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(MethodChoice, TaskConfig):
    """Train one model on one data set with one method, and write result.json and a checkpoint every epoch."""

    seed: int = 0
    """Seed of the initial weights and the order of the images."""

    def __post_init__(self) -> None:
        TaskConfig.__post_init__(self)
        if self.seed < 0:
            raise KronblocksError(f"--seed must be at least 0, not {self.seed}")
        if self.block_size == "auto" and self.method == "dense":
            raise KronblocksError("method 'dense' has no blocks to search for: leave --block-size out")
        is_dense = self.sparsity_config().resolved().storage == "dense"
        for name in ("factor_lr_scale", "tile_lr_scale", *OF_FREE_VALUES):
            if getattr(self, name) is None:
                continue
            if not has_setting(self.method, name):
                raise KronblocksError(f"method {self.method!r} has no parameters for {option(name)}: leave it out")
            if is_dense and name in OF_FREE_VALUES:
                raise KronblocksError(f"{option(name)} is for values of live blocks: leave it out, or add --storage packed")

    @property
    def recipe(self) -> Recipe:
        """The method's recipe, with the user's changes."""
        changed = {name: getattr(self, name) for name in Recipe._fields if getattr(self, name) is not None}
        return recipe_of(self.method)._replace(**changed)

    def sparsity_config(self) -> SparsityConfig:
        """The config for `sparsify_`."""
        names = {f.name for f in dataclasses.fields(SparsityConfig)} & {f.name for f in dataclasses.fields(self)}
        settings: dict[str, Any] = {name: getattr(self, name) for name in names} | {"target_sparsity": self.sparsity}
        if self.init is None and self.start_from and spec_of(self.method).draws_start:
            settings["init"] = "nearest"
        return SparsityConfig(**settings)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        data = dataclasses.asdict(self)
        for name in ("out", "resume", "progress", "data_dir", "plugins"):
            del data[name]
        data["start_from"] = None if self.start_from is None else str(self.start_from)
        data["block_size"] = str(self.block_size)
        data["tile_groups"] = None if self.tile_groups is None else str(self.tile_groups)
        data["candidates"] = None if self.candidates is None else list(self.candidates)
        return {**data, "widths": list(self.widths), "recipe": self.recipe._asdict()}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TaskConfig):
    """Run several methods and seeds of one task, each in its own process, and write one report."""

    methods: tuple[Method, ...] = ("dense", "two-phase")
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not self.seeds:
            raise KronblocksError("name at least one of --methods and one of --seeds")
        self.runs()

    def runs(self) -> list[TrainConfig]:
        """The trainings, one for each seed and method. Methods get only the settings that they have.

        Raises:
            KronblocksError: none of the methods has a setting.
        """
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TaskConfig)}
        runs = []
        for seed in dict.fromkeys(self.seeds):
            for method in dict.fromkeys(self.methods):
                auto = self.block_size == "auto"
                block = "" if method == "dense" else "-auto" if auto else f"-{BlockSize.parse(self.block_size)}"
                own = {"out": self.out / f"{method}{block}-s{seed}", "method": method, "seed": seed, "resume": True}
                runs.append(TrainConfig(**{**shared, **self._without_foreign(method), **own}))
        for name in (*OF_SOME_METHODS, "penalty", "schedule"):
            if all(getattr(run, name) != getattr(self, name) for run in runs):
                free = name in OF_FREE_VALUES and any("storage" in spec_of(method).settings for method in self.methods)
                packed = ", or add --storage packed" if free else ""
                methods = " ".join(self.methods)
                raise KronblocksError(f"none of --methods {methods} uses {name}: leave it out{packed}")
        return runs

    def _without_foreign(self, method: Method) -> dict[str, Any]:
        """The shared settings that a method does not have, with their defaults."""
        default = {f.name: f.default for f in dataclasses.fields(TaskConfig)}
        foreign = [name for name in OF_SOME_METHODS if not has_setting(method, name)]
        if "storage" in spec_of(method).settings and (self.storage or spec_of(method).defaults.storage) == "dense":
            foreign += OF_FREE_VALUES
        settings: dict[str, Any] = {name: default[name] for name in foreign}
        if method == "dense" and self.block_size == "auto":
            settings |= {name: default[name] for name in ("block_size", "candidates", "goal")}
        return settings | {"schedule": self._schedule_of(method), "penalty": self._penalty_of(method)}

    def _schedule_of(self, method: Method) -> ScheduleConfig:
        schedule, spec = self.schedule, spec_of(method)
        if ("schedule.shape" not in spec.settings and schedule.shape != spec.defaults.shape) or spec.starts_sparse:
            schedule = dataclasses.replace(schedule, shape=None)
        if (schedule.shape or spec.defaults.shape) != "staircase":
            schedule = dataclasses.replace(schedule, stages=ScheduleConfig.stages)
        return schedule if spec.is_lifted else dataclasses.replace(schedule, lift_at=ScheduleConfig.lift_at)

    def _penalty_of(self, method: Method) -> PenaltyConfig:
        penalty, spec = self.penalty, spec_of(method)
        if "penalty" not in spec.settings:
            return PenaltyConfig()
        if (penalty.form or spec.defaults.form) == "proximal":
            penalty = dataclasses.replace(penalty, growth=PenaltyConfig.growth)
        return penalty if "penalty.ridge" in spec.settings else dataclasses.replace(penalty, ridge=PenaltyConfig.ridge)
