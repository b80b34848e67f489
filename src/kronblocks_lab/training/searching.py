"""The block-size search on the data and models of the experiments: before a training, or alone."""

from __future__ import annotations

import functools
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
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.tasks import Task


def _device() -> torch.device:
    """The GPU that trainings take too, or the CPU, also beside accelerators without float64, in which losses are compared."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def search_task(task: Task, config: TrainConfig) -> SearchTask:
    """Training and validation data with the cross-entropy, on the GPU if there is one; the test part is not touched."""
    device = _device()

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in task.endless_batches(seed):
            yield inputs.to(device), labels.to(device)

    held_out = [(inputs.to(device), labels.to(device)) for inputs, labels in task.validation_batches()]
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast():
            return task.losses(model(batch[0]), batch[1])

    return SearchTask(batches, held_out, losses, **config.recipe._asdict())


def search_for(config: TrainConfig, task: Task, search: SearchConfig | MixtureConfig | None = None) -> SearchReport:
    """A search before a training; with `search` unset the one that a training with `block_size="auto"` begins with."""
    torch.manual_seed(config.seed)
    model, of_task = task.model().to(_device()), search_task(task, config)
    with Progress(console=Console(stderr=True), transient=True, disable=not config.progress) as progress:
        bar = progress.add_task("looking for the block size", total=1.0)
        shared: dict[str, Any] = {
            "total_steps": task.steps,
            "progress": lambda text, done: progress.update(bar, description=text, completed=done),
        }
        if isinstance(search, MixtureConfig):
            sparse = config.sparsity_config()
            return find_block_size_in_mixture_(model, sparse, of_task, search=search, sizes=config.candidates, **shared)
        own = SearchConfig(sizes=config.candidates, goal=config.goal, seed=config.seed)
        return find_block_size(model, config.sparsity_config(), of_task, search=search or own, **shared)


def check_candidates(config: TrainConfig, task: Task) -> None:
    """Refuse block sizes of which none can be searched among, in a moment instead of when the search begins.

    Raises:
        KronblocksError: none fits the model, the sparsity and the rank.
    """
    find_candidates(task.model(), config.sparsity_config(), config.candidates)
