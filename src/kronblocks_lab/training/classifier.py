"""The LightningModule of the main job: a classifier that a sparsifier follows, and what its training costs, counted."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from kronblocks.algorithms.training.distillation import Distillation
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.sparsify import densify_, sparsify_
from kronblocks_lab.data.sets import Dataset
from kronblocks_lab.training import accounting
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.trained import trained_model

WARM_UP = 0.1


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to 0."""
    warm = WARM_UP * total_steps
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm) / (total_steps - warm))))


class Classification(LightningModule):
    """A classifier that a sparsifier follows, and what its training costs, counted.

    Args:
        config: of the training.
        data: its images.
        sparsity: what `sparsify_` gets; None: what the config says.
    """

    def __init__(self, config: TrainConfig, data: Dataset, sparsity: SparsityConfig | None = None) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, data.image_shape, data.classes, config.widths, config.image_size)
        self.distillation, self._teacher_macs = None, 0
        if config.start_from is not None:
            self._start_from(config.start_from, data)
        self.sparsity_config = sparsity or config.sparsity_config()
        self.sparsifier = sparsify_(self.model, self.sparsity_config)
        self.total_steps = config.epochs * math.ceil(len(data.train) / config.batch_size)
        self.counter = accounting.MacCounter(self.model, data.train.images[:2])
        self._step_macs: dict[int, int] = {}
        self._measure = True
        self._clock = 0.0
        self.seconds = 0.0
        self.macs = 0
        self.history: list[dict[str, Any]] = []
        self.most_bytes: dict[str, int] = {}
        self.parameters_start = self.parameters_max = accounting.trainable_parameters(self.model)
        self._random_state: Tensor | None = None

    def _start_from(self, folder: Path, data: Dataset) -> None:
        """Take the weights of a finished training, and its model as the teacher where one is wanted."""
        trained, _ = trained_model(folder)
        densify_(trained)
        try:
            self.model.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise KronblocksError(
                f"{folder} holds no {self.config.model} for {self.config.data}: give the --model and --data it was trained with"
            ) from error
        if self.config.distill is not None:
            self._teacher_macs = accounting.MacCounter(trained, data.train.images[:2]).inference_macs()
            self.distillation = Distillation(trained, weight=self.config.distill)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(parameter_groups(self.model, **self.config.recipe._asdict()), fused=True)
        self.sparsifier.attach(optimizer, total_steps=self.total_steps)
        schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        if self._measure:
            with accounting.saved_tensor_bytes(self.model) as saved:
                loss = self._loss(images, labels)
            self._keep_most(saved)
        else:
            loss = self._loss(images, labels)
        if len(images) not in self._step_macs:
            self._step_macs[len(images)] = self.counter.training_macs(len(images))
        self.macs += self._step_macs[len(images)] + self._teacher_macs * len(images)
        if self.sparsifier.measures_growth:
            weights = {target.name: target.grid.weights for target in self.sparsifier.targets}
            self.macs += self.counter.growth_macs(len(images), weights)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), prog_bar=True)
        return loss

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.distillation is not None:
            loss = self.distillation(loss, logits, images)
        return loss + self.sparsifier.penalty()

    def _keep_most(self, measured: dict[str, int]) -> None:
        for name, value in measured.items():
            self.most_bytes[name] = max(value, self.most_bytes.get(name, 0))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        schedule, step = self.sparsifier.schedule, self.sparsifier.step
        assert schedule is not None
        if self._measure:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            self._keep_most(accounting.training_bytes(self.model, optimizer.optimizer))
        if step == 1 or schedule.start_step <= step <= schedule.end_step:
            self._step_macs.clear()  # densities and plans may have changed
        now = accounting.trainable_parameters(self.model)
        self.parameters_max = max(self.parameters_max, now)
        self._measure = step in (schedule.lift_step, schedule.end_step)  # the next step is of another kind

    def on_train_epoch_start(self) -> None:
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None
        self._clock = time.perf_counter()

    def on_validation_start(self) -> None:
        self.seconds += time.perf_counter() - self._clock

    def on_validation_end(self) -> None:
        self._clock = time.perf_counter()

    def _evaluate(self, batch: list[Tensor], name: str) -> None:
        images, labels = batch
        logits = self.model(images)
        self.log(f"{name}_loss", nn.functional.cross_entropy(logits, labels), batch_size=len(images))
        self.log(f"{name}_accuracy", (logits.argmax(1) == labels).float().mean(), batch_size=len(images), prog_bar=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "validation")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_train_epoch_end(self) -> None:
        self.seconds += time.perf_counter() - self._clock
        metrics = {name: accounting.finite(float(value)) for name, value in self.trainer.callback_metrics.items()}
        report = self.sparsifier.report()
        self.log("block_sparsity", report.block_sparsity)
        self.history.append(
            {
                "epoch": self.current_epoch + 1,
                "step": self.sparsifier.step,
                "phase": self.sparsifier.phase if self.sparsifier.targets else "dense",
                "train_loss": metrics.get("train_loss"),
                "validation_loss": metrics.get("validation_loss"),
                "validation_accuracy": metrics.get("validation_accuracy"),
                "block_sparsity": report.block_sparsity,
                "seconds": self.seconds,
                "training_macs": self.macs,
                "trainable_parameters": accounting.trainable_parameters(self.model),
            }
        )

    _METERS = ("seconds", "macs", "history", "most_bytes", "parameters_max")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sparsifier"] = self.sparsifier.state_dict()
        checkpoint["meters"] = {name: getattr(self, name) for name in self._METERS}
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sparsifier.load_state_dict(checkpoint["sparsifier"])
        for name in self._METERS:
            setattr(self, name, checkpoint["meters"][name])
        self._random_state = checkpoint["random_state"]
