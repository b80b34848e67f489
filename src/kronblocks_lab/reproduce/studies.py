"""Which trainings a study consists of: data, model, methods, block sizes, sparsities, seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from kronblocks.config.methods import Method, spec_of
from kronblocks.config.sparsity import ScheduleConfig
from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.data.sets import FOLDS
from kronblocks_lab.data.text import source_of
from kronblocks_lab.report.measures import Measure, measure_of
from kronblocks_lab.reproduce.ablations import BASE, FACTOR_RATES, GROUP_LASSO_FORMS, KRON_L1_FORMS, VARIANTS
from kronblocks_lab.reproduce.trials import Axis, Settings, Space, describe, rates, space_of, words
from kronblocks_lab.training.model_settings import DataName
from kronblocks_lab.training.models import ModelName
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.vision import TransformerName

METHODS: tuple[Method, ...] = (
    *("dense", "two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl", "iterative", "magnitude", "static"),
)


def has_cell(method: str, block: str) -> bool:
    """Whether a method can be compared at a block size: single weights have no factors."""
    return BlockSize.parse(block).area > 1 or not spec_of(method).is_factored


@dataclass(frozen=True)
class Cell:
    """A place in a study's table."""

    method: Method
    block: str  # "" for dense
    sparsity: float  # 0 for dense


@dataclass(frozen=True, kw_only=True)
class Study:
    """Methods on one task.

    Args:
        name: of the results file.
        data: data set.
        model: model.
        widths: hidden sizes of the MLP.
        epochs: of every training.
        batch_size: images a step.
        methods: those compared; dense has one cell whatever the blocks.
        cells: (block size, sparsity) pairs.
        tuned_at: sparsity at which every method is tuned, for each block size of its own.
        tuned_as: block sizes that take the settings of another one instead.
        seeds: of the trainings that are compared: the same for all methods, so that differences are paired.
        folds: 5-fold cross-validation: the training of seed s, with a fresh model, validates on fold s mod 5.
        image_size: pixels of a side, of transformers.
        train_images: how many of them; None: all.
        test_images: how many of them; None: all.
        tuning_seeds: of the trials, others than those.
        base: settings that all trainings share.
        variants: of the one method, by name, which then is not tuned; None: methods are compared.
        rates: learning rates to try, and nothing else, for what is too dear to try more; None: what each method's trials are.
        lr: learning rate of all methods, which then are not tuned; None: they are.
        chosen: settings of each method, instead of trials of its own.
        threads: of each training; None: torch's own choice, for a machine with a GPU.
        data_dir: folder of the images; None: where they are looked for.
        data_file: the text; None: the standard library.
        data_label: what the data is where it is not the original.
    """

    name: str
    data: DataName
    model: ModelName = "mlp"
    widths: tuple[int, ...] = (512, 256)
    epochs: int = 8
    batch_size: int = 256
    methods: tuple[Method, ...] = METHODS
    cells: tuple[tuple[str, float], ...]
    tuned_at: float = 0.9
    tuned_as: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)
    folds: bool = False
    image_size: int | None = None
    train_images: int | None = None
    test_images: int | None = None
    base: Settings = field(default_factory=dict)
    variants: Mapping[str, Settings] | None = None
    rates: Axis | None = None
    lr: float | None = None
    chosen: Mapping[Method, Settings] | None = None
    threads: int | None = 1
    data_dir: Path | None = None
    data_file: Path | None = None
    data_label: str | None = None

    @property
    def measure(self) -> Measure:
        """What trials are chosen and trainings compared by."""
        return measure_of({"data": self.data})

    def space(self, method: Method) -> Space:
        """What may be tried for a method."""
        return space_of(method) if self.rates is None else Space([self.rates])

    def settings(self, method: Method, number: int) -> Settings:
        """The settings with a number: a trial's, a variant's, or the only ones."""
        if self.variants is not None:
            return list(self.variants.values())[number]
        if self.chosen is not None:
            return self.chosen[method]
        return self.space(method).settings(number) if self.lr is None else {"lr": self.lr}

    def words(self, method: Method, number: int) -> str:
        """The same for a reader."""
        if self.variants is not None:
            return list(self.variants)[number]
        if self.chosen is not None or self.lr is not None:
            return words(describe(self.settings(method, number)))
        return self.space(method).words(number)

    def table(self) -> list[Cell]:
        """All cells, dense first; blocks of one weight have no factors, so methods that begin with them are left out there."""
        dense = [Cell("dense", "", 0.0)] if "dense" in self.methods else []
        others: list[Method] = [method for method in self.methods if method != "dense"]
        return dense + [
            Cell(method, block, sparsity) for block, sparsity in self.cells for method in others if has_cell(method, block)
        ]

    def tuned(self) -> list[Cell]:
        """Where methods are tuned: once for each block size, at one sparsity."""
        if self.variants is not None or self.lr is not None or self.chosen is not None:
            return []
        return list(dict.fromkeys(self.tuned_for(cell) for cell in self.table()))

    def tuned_for(self, cell: Cell) -> Cell:
        """Where the settings of a cell were tuned."""
        return cell if cell.method == "dense" else Cell(cell.method, self.tuned_as.get(cell.block, cell.block), self.tuned_at)

    def training(self, cell: Cell, settings: Settings, seed: int, out: Path) -> TrainConfig:
        """One training. Plans are chosen by counts, so that accuracies do not hang on timings."""
        sparse: dict[str, Any] = {} if cell.method == "dense" else {"block_size": cell.block, "sparsity": cell.sparsity}
        return TrainConfig(
            out=out,
            data=self.data,
            model=self.model,
            widths=self.widths if self.model == "mlp" else TrainConfig.widths,
            image_size=self.image_size,
            train_images=self.train_images,
            test_images=self.test_images,
            data_dir=self.data_dir,
            data_file=self.data_file,
            data_label=self.data_label,
            fold=seed % FOLDS if self.folds else None,
            epochs=self.epochs,
            batch_size=self.batch_size,
            method=cell.method,
            seed=seed,
            resume=True,
            progress=False,
            measure_plans=False,
            threads=self.threads,
            **sparse,
            **{**self.base, **settings},
        )

    def shared(self) -> dict[str, Any]:
        """What all rows of the results have in common, as plain values."""
        names = ("data", "model", "image_size", "train_images", "test_images", "folds", "epochs", "batch_size", "tuned_at")
        source = None if self.data_label is None else f"{self.data} ({self.data_label})"
        return {
            **{name: getattr(self, name) for name in names},
            "source": str(source_of(self.data_file)) if self.data == "text" else source,
            "widths": list(self.widths) if self.model == "mlp" else [],
            "threads": self.threads,
            "tuned_as": dict(self.tuned_as),
            "base": describe(self.base),
            "methods": list(self.methods),
            "axes": {cell.method: self.space(cell.method).described() for cell in self.tuned()},
            "variants": None if self.variants is None else {name: describe(each) for name, each in self.variants.items()},
        }


_SHORT_TRANSFORMER: dict[str, Any] = {  # some minutes a training
    "data": "fashion-mnist", "image_size": 32, "train_images": 1000, "test_images": 2000, "epochs": 5, "batch_size": 16,
    "cells": (("16", 0.8),), "seeds": (0, 1, 2), "lr": 5e-4, "base": {"schedule": ScheduleConfig(update_every=10)},
}  # fmt: skip
_TUNED_TRANSFORMER: dict[str, Any] = {  # 500 steps instead of 300, a rate of its own for each method
    **_SHORT_TRANSFORMER,
    "train_images": 2000, "test_images": 1000, "epochs": 4, "tuned_at": 0.8, "tuning_seeds": (100,),
    "lr": None, "rates": rates((1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), slice(2, 4)),
}  # fmt: skip
_FACTOR_RATES: dict[str, Any] = {**_TUNED_TRANSFORMER, "methods": ("two-phase",), "rates": None, "variants": FACTOR_RATES}
_WHOLE_TRANSFORMER: dict[str, Any] = {
    "data": "cifar100", "epochs": 100, "batch_size": 256, "cells": (("4", 0.5), ("32", 0.8), ("32", 0.9)),
    "seeds": (0, 1, 2), "threads": None, "tuned_at": 0.8, "tuned_as": {"4": "32"}, "tuning_seeds": (100,),
    "rates": rates((1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3), slice(2, 4)),  # each trial is a whole training
}  # fmt: skip

_FREE: tuple[Method, ...] = ("dense", "two-phase", "static", "rigl", "magnitude")  # what trains transformers in some hours
_DECODER: dict[str, Any] = {
    "data": "text", "model": "decoder", "epochs": 4, "batch_size": 16, "methods": _FREE, "tuned_at": 0.8,
    "base": {"width": 256, "depth": 4, "heads": 4, "context": 128, "steps": 2000}, "seeds": (0, 1, 2), "tuning_seeds": (100,),
}  # fmt: skip
_VIT: dict[str, Any] = {
    "data": "cifar100", "epochs": 15, "batch_size": 128, "seeds": (0, 1, 2), "tuning_seeds": (100,),
    "rates": rates((2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3), slice(2, 4)),
}  # fmt: skip

_FORMS: tuple[tuple[Method, Settings, Mapping[str, Settings]], ...] = (
    ("group-lasso", {"lr": 8e-3, "schedule": ScheduleConfig(end=0.5)}, GROUP_LASSO_FORMS),
    ("kron-l1", {"lr": 1.6e-2, "rank": 8}, KRON_L1_FORMS),
)

STUDIES = {
    study.name: study
    for study in (
        *(Study(name=f"{model}-fashion", model=model, **_SHORT_TRANSFORMER) for model in ("vit-tiny", "swin-tiny")),
        *(Study(name=f"{model}-fashion-tuned", model=model, **_TUNED_TRANSFORMER) for model in ("vit-tiny", "swin-tiny")),
        *(Study(name=f"{model}-factor-rates", model=model, **_FACTOR_RATES) for model in ("vit-tiny", "swin-tiny")),
        *(Study(name=f"{model}-cifar100", model=model, **_WHOLE_TRANSFORMER) for model in get_args(TransformerName)),
        Study(  # rates tuned alike for all methods, which the next one has none of
            name="decoder",
            cells=(("16", 0.8), ("16", 0.9), ("32", 0.8), ("32", 0.9)),
            tuned_as={"32": "16"},
            rates=rates((5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), slice(2, 4)),
            **_DECODER,
        ),
        Study(name="decoder-one-rate", cells=(("16", 0.8), ("16", 0.9)), lr=2e-3, **_DECODER),
        Study(
            name="vit-cifar100",
            model="vit",
            cells=(("16", 0.8), ("16", 0.9)),
            methods=_FREE,
            tuned_at=0.8,
            base={"width": 192, "depth": 6, "heads": 3, "patch": 4},
            **_VIT,
        ),
        Study(  # the paper's model and methods, on images as they are
            name="vit-tiny-cifar100-small",
            model="vit-tiny",
            image_size=32,
            cells=(("4", 0.5),),
            methods=("dense", "two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl"),
            tuned_at=0.5,
            base={"crop": 4, "flip": True, "label_smoothing": 0.1, "weight_decay": 0.05, "clip": 1.0},
            **_VIT,
        ),
        Study(
            name="mlp",
            data="fashion-mnist",
            cells=(
                *((block, 0.9) for block in ("2", "4", "8", "16")),
                *((block, sparsity) for sparsity in (0.5, 0.8, 0.95) for block in ("4", "16")),
            ),
            tuned_as={"2": "4", "8": "16"},
        ),
        Study(
            name="ablation",
            data="fashion-mnist",
            methods=("two-phase",),
            cells=(("4", 0.9), ("16", 0.9)),
            seeds=(0, 1, 2),
            base=BASE,
            variants=VARIANTS,
        ),
        *(
            Study(
                name=f"{method}-forms",
                data="fashion-mnist",
                methods=(method,),
                cells=(("4", 0.9), ("16", 0.9)),
                seeds=(0, 1, 2),
                base=base,
                variants=forms,
            )
            for method, base, forms in _FORMS
        ),
        Study(name="linear-mnist5k", data="mnist5k", model="linear", epochs=20, folds=True, cells=(("2", 0.5), ("2", 0.9))),
        Study(name="linear-fashion", data="fashion-mnist", model="linear", epochs=8, folds=True, cells=(("2", 0.5), ("2", 0.9))),
        Study(name="lenet5-mnist5k", data="mnist5k", model="lenet5", epochs=20, cells=(("4", 0.5), ("4", 0.9))),
        Study(
            name="lenet5-fashion",
            data="fashion-mnist",
            model="lenet5",
            epochs=8,
            cells=(("4", 0.5), ("4", 0.9)),
            seeds=(0, 1, 2),
            tuning_seeds=(100,),  # a minute a training
        ),
        Study(  # what the size of the blocks costs there, down to single weights, with twice the epochs
            name="lenet5-fashion-finer",
            data="fashion-mnist",
            model="lenet5",
            epochs=16,
            methods=("dense", "two-phase", "magnitude"),
            cells=(("1", 0.9), ("2", 0.9), ("4", 0.9)),
            chosen={
                "dense": {"lr": 8e-3, "weight_decay": 0.05},
                "two-phase": {"lr": 8e-3},
                "magnitude": {"lr": 8e-3, "schedule": ScheduleConfig(end=0.7)},
            },
        ),
    )
}


def _short(block: str) -> str:
    """A block size as studies write it: one number for a square."""
    size = BlockSize.parse(block)
    return str(size.rows) if size.rows == size.cols else str(size)


def own_study(
    base: Study, name: str, block_sizes: Sequence[str] | None, sparsities: Sequence[float] | None, **changes: Any
) -> Study:
    """A study like another, with cells, methods, data or seeds of one's own; tuned as methods are, at the first sparsity.

    Args:
        base: gives the model and what is not named.
        name: of its results file.
        block_sizes: each at every sparsity; None: those of the other study.
        sparsities: see block_sizes.
        changes: of other fields.

    Raises:
        KronblocksError: the name is taken, or a training cannot be.
    """
    if name in STUDIES:
        raise KronblocksError(f"{name} is a study of the docs: choose another --name")
    blocks = list(dict.fromkeys(map(_short, block_sizes or (block for block, _ in base.cells))))
    shares = list(dict.fromkeys(sparsities or (sparsity for _, sparsity in base.cells)))
    methods = tuple(dict.fromkeys(("dense", *changes.pop("methods", base.methods))))
    for block in blocks:
        if not any(has_cell(method, block) for method in methods if method != "dense"):
            raise KronblocksError(f"none of {', '.join(methods)} can be compared with blocks of {block}: name other methods")
    cells = tuple((block, sparsity) for sparsity in shares for block in blocks)
    if "steps" in changes:
        changes["base"] = {**base.base, "steps": changes.pop("steps")}
    if "lr" in changes:
        changes["rates"] = None
    study = dataclasses.replace(
        base, name=name, cells=cells, methods=methods, tuned_at=shares[0], tuned_as={}, chosen=None, variants=None, **changes
    )
    if taken := set(study.seeds) & set(study.tuning_seeds):
        raise KronblocksError(f"seeds {sorted(taken)} are those of the trials: compare with others")
    for cell in study.table():  # settings that cannot be are refused before anything runs
        study.training(cell, study.settings(cell.method, 0), study.seeds[0], Path())
    return study
