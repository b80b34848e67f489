"""The training of a language model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kronblocks_lab.data.text import decoded
from kronblocks_lab.training import accounting
from kronblocks_lab.training.decoder import written
from kronblocks_lab.training.module import Training
from kronblocks_lab.training.tasks import TextTask

TEMPERATURE = 0.8
"""Of the text that a trained model writes for the report."""

_PLACES = (0.1, 0.5, 0.9)  # of the prompts in the validation part
_PROMPT, _SEED = 80, 0
WRITTEN = 200
"""Characters of each sample."""


class LanguageModelling(Training):
    """A model of the next character: losses are means over characters, in nats."""

    task: TextTask

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(inputs)
        loss = _cross_entropy(logits, labels)
        return loss if self.distillation is None else self.distillation(loss, logits, inputs)

    def evaluate(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return _cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()

    def results(self, test_loss: float) -> dict[str, Any]:
        """Perplexity and bits per character of the test part, and what the model writes after parts of the validation part."""
        codes, vocabulary = self.task.text.validation.codes, self.task.text.vocabulary
        length = min(_PROMPT, self.task.size.context, len(codes))
        starts = [int(place * (len(codes) - length)) for place in _PLACES]
        prompts = torch.stack([codes[start : start + length] for start in starts]).long().to(self.device)
        texts = written(self.model, prompts, WRITTEN, self.task.size.context, TEMPERATURE, _SEED)
        samples = [
            {"prompt": decoded(prompt, vocabulary), "text": decoded(text, vocabulary)}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return {
            "test_perplexity": accounting.finite(math.exp(min(test_loss, 700.0))),
            "test_bits_per_character": accounting.finite(test_loss / math.log(2)),
            "samples": {"temperature": TEMPERATURE, "seed": _SEED, "texts": samples},
        }


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
