"""The training of a classifier of images."""

from __future__ import annotations

from torch import Tensor, nn

from kronblocks_lab.training.module import Training


class Classification(Training):
    """A classifier of images: cross-entropy with the labels, and a trained model's outputs where one is the teacher."""

    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        return loss if self.distillation is None else self.distillation(loss, logits, inputs)

    def evaluate(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()
