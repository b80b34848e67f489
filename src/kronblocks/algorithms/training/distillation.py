"""Learn from a trained model beside the labels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError


class Distillation:
    """Mix a training loss with the distance to a trained model's outputs (equation 21 in docs/math.md).

    The teacher is no part of the student: no module, optimiser or checkpoint contains it.

    Args:
        teacher: a trained model with the same inputs. It is copied as it is now, set to eval, and gets no gradient. The copy
            follows the student to its device.
        weight: share of the distance in the loss, in [0, 1].
        temperature: softens both outputs; above 0.

    Raises:
        KronblocksError: a weight or temperature out of range.

    Source:
        Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.

    >>> model = nn.Linear(4, 3)
    >>> distillation = Distillation.of(model, weight=0.5)
    >>> x = torch.ones(2, 4)
    >>> loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1]))
    >>> bool(distillation(loss, model(x), x) == 0.5 * loss)
    True
    """

    def __init__(self, teacher: nn.Module, *, weight: float = 0.5, temperature: float = 2.0) -> None:
        if weight != 1:
            number("weight", weight, 0, 1, "the share of the teacher in the loss, from 0 to 1")
        number("temperature", temperature, 1e-6, float("inf"), "a number above 0")
        self.weight, self.temperature = weight, temperature
        if not isinstance(teacher, nn.Module):
            raise KronblocksError(f"the teacher must be a model, not {type(teacher).__name__}")
        self._teacher = copy.deepcopy(teacher).eval().requires_grad_(False)

    @classmethod
    def of(cls, model: nn.Module, *, weight: float = 0.5, temperature: float = 2.0) -> Distillation:
        """Use the model as it is now as the teacher. Call this before `sparsify_`."""
        return cls(model, weight=weight, temperature=temperature)

    def __call__(self, loss: Tensor, outputs: Any, *inputs: Any, **named_inputs: Any) -> Tensor:
        """The loss to train on.

        Args:
            loss: the loss by the labels.
            outputs: the student's logits (..., classes), or an object or mapping with `logits`.
            inputs: the student's inputs.
            named_inputs: its inputs by name; labels may be among them.

        Raises:
            KronblocksError: teacher and student give logits of different shapes, or of fewer than two classes.
        """
        logits = _logits(outputs)
        if logits.dim() < 2 or logits.shape[-1] < 2:
            raise KronblocksError(
                f"distillation compares logits (..., classes) of at least two classes, not {tuple(logits.shape)}"
            )
        with torch.no_grad():
            wanted = _logits(self._teacher.to(logits.device)(*inputs, **named_inputs))
        if wanted.shape != logits.shape:
            raise KronblocksError(
                f"the teacher gives logits {tuple(wanted.shape)} and the model {tuple(logits.shape)}: use a teacher of this task"
            )
        kind = torch.promote_types(logits.dtype, torch.float32)  # half precision is too coarse for the loss
        ours, theirs = (torch.log_softmax(each.to(kind) / self.temperature, -1).flatten(0, -2) for each in (logits, wanted))
        total = nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) * self.temperature**2
        distance = total / max(1, len(ours))
        return (1 - self.weight) * loss + self.weight * distance


def _logits(outputs: Any) -> Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise KronblocksError(f"distillation compares logits, and the model gives {type(outputs).__name__} without any")
    return logits
