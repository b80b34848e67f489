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
from kronblocks.search.config import Goal
from kronblocks_lab.training.model_settings import ModelAndData, option
from kronblocks_lab.training.recipes import (
    OF_FACTORS,
    OF_FREE_VALUES,
    OF_SOME_METHODS,
    Course,
    Recipe,
    course_of,
    has_setting,
    recipe_of,
)
from kronblocks_lab.training.sizes import folder_of, size_of
from kronblocks_lab.training.timing_settings import TimingSettings

RESULT_VERSION = 2
"""Version of result.json. From 2 on, inference multiply-adds do not count zero blocks."""


def part_of_a_file_name(flag: str, value: str) -> None:
    """Raise KronblocksError for a value that a file's name should not contain."""
    if not re.fullmatch(r"[a-zA-Z0-9_][a-zA-Z0-9_-]*", value):
        raise KronblocksError(f"{flag} becomes part of a file's name: write letters, digits, - and _, not {value!r}")


_COURSE: dict[str, tuple[float, str]] = {
    "beta2": (1.0, "a number from 0 to below 1"),
    "clip": (math.inf, "a number above 0"),
    "warm_up": (1.0, "a share of the steps, from 0 to below 1"),
    "final_lr": (1 + 1e-12, "a share of the learning rate, from 0 to 1"),
}


@dataclass(frozen=True, kw_only=True)
class TaskConfig(MethodSettings, BlockSettings, TimingSettings, ModelAndData):
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
    """Weight decay of factors; unset: the method's default."""
    factor_lr_scale: float | None = None
    """Learning rate of factors, relative to what follows from --lr and their shapes; unset: the method's default."""
    tile_lr_scale: float | None = None
    """Learning rate of tiles, relative to that of the other factors; unset: 1."""
    lifted_lr_scale: float | None = None
    """Learning rate of free block values, relative to --lr over the density; unset: the method's default."""
    lifted_weight_decay: float | None = None
    """Weight decay of free block values; unset: that of dense weights."""
    beta2: float | None = None
    """AdamW's memory of squared gradients; unset: 0.999, or 0.99 with --model decoder."""
    clip: float | None = None
    """Largest norm of all gradients together; unset: any, or 1 for decoder and vit."""
    warm_up: float | None = None
    """Share of the steps in which the learning rates rise; unset: 0.1."""
    final_lr: float | None = None
    """Where learning rates end, as a share of their highest; unset: 0, or 0.1 with --model decoder."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: activations and products in bfloat16, weights and optimiser in float32."""
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
        TimingSettings.__post_init__(self)
        epochs = self.epochs != ModelAndData.epochs and not self.is_text
        self.check_budget(threads=self.threads, block_size=self.block_size, steps=self.steps, epochs=epochs)
        for name, (most, what) in _COURSE.items():
            if getattr(self, name) is not None:
                number(option(name), getattr(self, name), 0, most, what)
        if self.clip == 0:
            raise KronblocksError("--clip 0 would leave no gradient: write a number above 0, or leave it out")
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
        for name in (*OF_FACTORS, *OF_FREE_VALUES):
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
        return recipe_of(self.method, self.model)._replace(**changed)

    @property
    def course(self) -> Course:
        """The model's course, with the user's changes."""
        changed = {name: getattr(self, name) for name in Course._fields if getattr(self, name) is not None}
        return course_of(self.model)._replace(**changed)

    def sparsity_config(self) -> SparsityConfig:
        """The config for `sparsify_`."""
        names = {f.name for part in (MethodChoice, BlockSettings, MethodSettings) for f in dataclasses.fields(part)}
        settings: dict[str, Any] = {name: getattr(self, name) for name in names}
        settings |= {"target_sparsity": self.sparsity, "exclude": self.left_dense}
        if self.init is None and self.start_from and spec_of(self.method).draws_start:
            settings["init"] = "nearest"
        return SparsityConfig(**settings)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the result, as plain values."""
        data = dataclasses.asdict(self)
        for name in ("out", "resume", "progress", "data_dir", "data_file", "plugins"):
            del data[name]
        data["start_from"] = None if self.start_from is None else str(self.start_from)
        data["block_size"] = str(self.block_size)
        data["tile_groups"] = None if self.tile_groups is None else str(self.tile_groups)
        data["candidates"] = None if self.candidates is None else list(self.candidates)
        subject = self.subject() | ({} if self.budget_seconds is None else {"steps": None})
        return {**data, **subject, "recipe": {**self.recipe._asdict(), **self.course._asdict()}}


@dataclass(frozen=True, kw_only=True)
class CompareConfig(TaskConfig):
    """Run several methods and seeds of one task, each in its own process, and write one report."""

    methods: tuple[Method, ...] = ("dense", "two-phase")
    seeds: tuple[int, ...] = (0,)
    try_sizes: tuple[str, ...] = ()
    """Sizes of the model, such as width=256 width=384,depth=6 or widths=512-256, which every method tries within
    --budget-seconds with the first seed. The best on validation data is trained with all seeds and reported."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.methods or not self.seeds:
            raise KronblocksError("name at least one of --methods and one of --seeds")
        if self.try_sizes and self.budget_seconds is None:
            raise KronblocksError("--try-sizes compares sizes within the same time: add --budget-seconds")
        if len({tuple(sorted(size_of(size).items())) for size in self.try_sizes}) < len(self.try_sizes):
            raise KronblocksError(f"--try-sizes {' '.join(self.try_sizes)} names a size twice: write each once")
        for size in self.try_sizes or (None,):
            self.runs(size)

    def runs(self, size: str | None = None) -> list[TrainConfig]:
        """The trainings, one for each seed and method. Methods get only the settings that they have.

        Args:
            size: one of `try_sizes`; None: that of the other settings.

        Raises:
            KronblocksError: none of the methods has a setting.
        """
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(TaskConfig)}
        runs = []
        for seed in dict.fromkeys(self.seeds):
            for method in dict.fromkeys(self.methods):
                auto = self.block_size == "auto"
                block = "" if method == "dense" else "-auto" if auto else f"-{BlockSize.parse(self.block_size)}"
                named = "" if size is None else f"-{folder_of(size)}"
                own = {"out": self.out / f"{method}{block}{named}-s{seed}", "method": method, "seed": seed, "resume": True}
                own |= {} if size is None else size_of(size)
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
