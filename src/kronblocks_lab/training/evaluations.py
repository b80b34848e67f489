"""Evaluations during a training: the same part of the validation data every few steps, for curves of quality over time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.surgery.replace import evaluating
from kronblocks_lab.training.tasks import Task

SHARE = 0.1
"""What evaluations may cost, as a share of the training steps between them, unless the user says otherwise."""


def samples_of(available: int, every: int, batch_size: int, wanted: int | None = None) -> int:
    """Validation samples of each evaluation.

    A sample costs a third as much as in training, where two products of three are for gradients.

    Args:
        available: in the validation part.
        every: steps between evaluations.
        batch_size: samples in a step.
        wanted: by the user; None: as many as cost a tenth of the steps between.

    >>> samples_of(6000, every=20, batch_size=256), samples_of(6000, every=2, batch_size=256), samples_of(6000, 20, 256, 100)
    (1536, 154, 100)
    """
    return min(available, wanted or max(1, round(3 * SHARE * every * batch_size)))


class Evaluator:
    """The loss and accuracy of a model on samples of the validation part, evenly spread and always the same.

    Args:
        task: gives the validation part.
        samples: how many, see `samples_of`.
    """

    def __init__(self, task: Task, samples: int) -> None:
        batches = task.validation_batches()
        self._data: Any = batches.dataset
        available = len(self._data)
        places = torch.arange(samples) * available // samples
        sampler: Any = batches.sampler
        self._places = places.split(sampler.batch_size)

    @staticmethod
    def available(task: Task) -> int:
        """Samples in a task's validation part."""
        data: Any = task.validation_batches().dataset
        return len(data)

    def _batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        for places in self._places:
            inputs, labels = self._data[places]
            yield inputs.to(device), labels.to(device)

    @torch.no_grad()
    def __call__(self, model: nn.Module, evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss and accuracy.

        Args:
            model: which is evaluated.
            evaluate: gives mean loss and accuracy of a batch.
        """
        device = next(model.parameters()).device
        total, count = torch.zeros(2, dtype=torch.float64), 0
        with evaluating(model):
            for inputs, labels in self._batches(device):
                total += len(inputs) * torch.stack(evaluate(inputs, labels)).double().cpu()
                count += len(inputs)
        loss, accuracy = (total / count).tolist()
        return loss, accuracy
