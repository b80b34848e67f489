"""The block-size search on the data sets and models of the experiments: before a training, or alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from kronblocks.search.candidates import find_candidates
from kronblocks.search.config import MixtureConfig, SearchConfig
from kronblocks.search.halving import find_block_size
from kronblocks.search.mixture import find_block_size_in_mixture_
from kronblocks.search.report import SearchReport
from kronblocks.search.task import SearchTask
from kronblocks_lab.data.sets import BatchSampler, Dataset
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.recipes import Recipe
from kronblocks_lab.training.settings import TrainConfig


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
