"""`kronblocks search`: the block-size search on the data sets and models of the experiments."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from kronblocks.errors import KronblocksError
from kronblocks.experiments.data import BatchSampler, Dataset, limited, load_data
from kronblocks.experiments.models import build_model
from kronblocks.experiments.search_figure import draw
from kronblocks.experiments.tasks import ModelAndData, Recipe, TrainConfig
from kronblocks.experiments.versions import versions
from kronblocks.files import write_json
from kronblocks.methods import Method
from kronblocks.search.candidates import find_candidates
from kronblocks.search.halving import Goal, SearchConfig, find_block_size
from kronblocks.search.mixture import MixtureConfig, Weights, find_block_size_in_mixture_
from kronblocks.search.report import SearchReport
from kronblocks.search.task import SearchTask


def _device() -> torch.device:
    """The GPU that trainings take too, or the CPU, also beside accelerators without float64, in which losses are compared."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def search_task(data: Dataset, batch_size: int, recipe: Recipe) -> SearchTask:
    """Training and validation images with the cross-entropy, on the GPU if there is one; the test images are not touched."""
    device = _device()

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        sampler = BatchSampler(len(data.train), batch_size, seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for numbers in sampler:
                yield data.train.images[numbers].to(device), data.train.labels[numbers].to(device)

    images, labels = data.validation.images.to(device), data.validation.labels.to(device)
    held_out = list(zip(images.split(1000), labels.split(1000), strict=True))

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return SearchTask(batches, held_out, losses, **recipe._asdict())


def steps_of(config: TrainConfig, data: Dataset) -> int:
    """Optimiser steps of a training."""
    return config.epochs * math.ceil(len(data.train) / config.batch_size)


def search_for(config: TrainConfig, data: Dataset, search: SearchConfig | MixtureConfig | None = None) -> SearchReport:
    """A search before a training; with `search` unset the one that a training with `block_size="auto"` begins with."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, data.image_shape, data.classes, config.widths, config.image_size).to(_device())
    task = search_task(data, config.batch_size, config.recipe)
    with Progress(console=Console(stderr=True), transient=True, disable=not config.progress) as progress:
        bar = progress.add_task("looking for the block size", total=1.0)
        shared: dict[str, Any] = {
            "total_steps": steps_of(config, data),
            "progress": lambda text, done: progress.update(bar, description=text, completed=done),
        }
        if isinstance(search, MixtureConfig):
            sparse = config.sparsity_config()
            return find_block_size_in_mixture_(model, sparse, task, search=search, sizes=config.candidates, **shared)
        own = SearchConfig(sizes=config.candidates, goal=config.goal, seed=config.seed)
        return find_block_size(model, config.sparsity_config(), task, search=search or own, **shared)


def check_candidates(config: TrainConfig, data: Dataset) -> None:
    """Refuse block sizes of which none can be searched among, in a moment instead of when the search begins.

    Raises:
        KronblocksError: none fits the model, the sparsity and the rank.
    """
    model = build_model(config.model, data.image_shape, data.classes, config.widths, config.image_size)
    find_candidates(model, config.sparsity_config(), config.candidates)


@dataclass(frozen=True, kw_only=True)
class FindConfig(ModelAndData):
    """Find the block size for a model and its data: the cheapest one that loses nothing."""

    out: Path | None = None
    """Folder for the report: search.json and search.png."""
    method: Method = "two-phase"
    sizes: tuple[str, ...] | None = None
    """Candidates, such as 4 8 16x4; unset: squares of powers of two from 2 to 64."""
    goal: Goal = "step-time"
    """What counts among candidates that lose nothing."""
    criterion: Literal["halving", "removal", "penalty"] = "halving"
    """How candidates are judged: short trainings side by side, or all in one model by removal or by the paper's penalty."""
    per_layer: bool = False
    """A size for each layer; with --criterion removal or penalty."""
    weights: Weights = "time"
    """What a candidate is measured against with --criterion removal or penalty: its time, or equal; equal is the paper's own."""
    strength: float | None = None
    """Of the penalty at first, with --criterion penalty; unset: 10. It ends at 10 times that."""
    budget: float | None = None
    """Steps of the search, as a share of the training's; unset: 1 with --criterion halving, 0.5 with the others, or the least."""
    tolerance: float = SearchConfig.tolerance
    """Share of the best held-out loss that counts as nothing; with --criterion halving."""
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sizes is not None and len(self.sizes) < 2:
            given = f"names {self.sizes[0]} alone" if self.sizes else "names no block size"
            raise KronblocksError(f"--sizes {given}: a search wants at least two, such as 4 8 16x4, or leave it out")
        if self.per_layer and self.criterion == "halving":
            raise KronblocksError("--per-layer wants --criterion removal or penalty: halving tries one size for the whole model")
        if self.weights != "time" and self.criterion == "halving":
            raise KronblocksError("--weights is for --criterion removal or penalty: halving has --goal")
        if self.strength is not None and self.criterion != "penalty":
            raise KronblocksError(f"--strength is of the penalty of --criterion penalty: {self.criterion} has none")
        if self.tolerance != SearchConfig.tolerance and self.criterion != "halving":
            raise KronblocksError(f"--tolerance is for --criterion halving, not {self.criterion}")
        if self.goal != "step-time" and self.criterion != "halving":
            raise KronblocksError(f"--goal is for --criterion halving: {self.criterion} weighs candidates by their step time")
        self.training()

    def training(self) -> TrainConfig:
        """The training that would follow."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelAndData)}
        return TrainConfig(out=Path(), method=self.method, block_size="auto", candidates=self.sizes, seed=self.seed, **shared)


def run(config: FindConfig) -> SearchReport:
    """Search, show the report, and write it if asked."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    training = config.training()
    data = limited(load_data(config.data, data_dir=config.data_dir), config.train_images, config.test_images)
    if config.criterion == "halving":
        search = SearchConfig(config.sizes, config.goal, config.budget, tolerance=config.tolerance, seed=config.seed)
    else:
        search = MixtureConfig(
            criterion=config.criterion,
            weights=config.weights,
            per_layer=config.per_layer,
            budget=config.budget,
            strength=MixtureConfig.strength if config.strength is None else config.strength,
            seed=config.seed,
        )
    report = search_for(training, data, search)
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(report), markup=False)
    chosen = str(report.winner) if report.winner else ", ".join(f"{name} {size}" for name, size in report.chosen.items())
    console.print(f"found: {chosen}, in {report.seconds:.1f} s and {report.steps:,} steps")
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "search.json", {**report.to_dict(), "config": training.settings(), "versions": versions()})
        draw(report, config.out / "search.png")
        console.print(f"report: {config.out.resolve()}")
    return report
