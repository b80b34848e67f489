"""The LightningModule that all trainings share: a model that a sparsifier follows, and what its training costs, counted."""

from __future__ import annotations

import math
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kronblocks.algorithms.training.distillation import Distillation
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.surgery.groups import parameter_groups
from kronblocks.surgery.sparsify import densify_, sparsify_
from kronblocks_lab.training import accounting
from kronblocks_lab.training.clock import TrainingClock
from kronblocks_lab.training.evaluations import Evaluator, samples_of
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.tasks import Task
from kronblocks_lab.training.trained import trained_model


def learning_rate_factor(step: int, total_steps: int, warm_up: float = 0.1, final: float = 0.0) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to the final share of the rate."""
    warm = warm_up * total_steps
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm) / (total_steps - warm)))
    return min((step + 1) / warm if warm else 1.0, final + (1 - final) * cosine)


class Training(LightningModule):
    """A model that a sparsifier follows, and what its training costs, counted.

    A subclass says what it learns: `training_loss` and `evaluate`.

    Args:
        config: of the training.
        task: its data and model.
        sparsity: what `sparsify_` gets; None: what the config says.
    """

    def __init__(self, config: TrainConfig, task: Task, sparsity: SparsityConfig | None = None) -> None:
        super().__init__()
        self.config, self.task = config, task
        torch.manual_seed(config.seed)
        self.model = task.model()
        self.distillation, self._teacher_macs = None, 0
        if config.start_from is not None:
            self._start_from(config.start_from)
        self.sparsity_config = sparsity or config.sparsity_config()
        self.sparsifier = sparsify_(self.model, self.sparsity_config)
        self.total_steps = task.steps
        self.counter = accounting.MacCounter(self.model, task.example)
        self._step_macs: dict[int, int] = {}
        self._measure = True
        self.clock = TrainingClock()
        self._evaluator = self._new_evaluator()
        self.evaluations: list[dict[str, Any]] = []
        self.macs = 0
        self.history: list[dict[str, Any]] = []
        self.most_bytes: dict[str, int] = {}
        self.parameters_start = self.parameters_max = accounting.trainable_parameters(self.model)
        self._random_state: Tensor | None = None

    def _new_evaluator(self) -> Evaluator | None:
        """What evaluates between epochs."""
        every, available = self.config.evaluate_every, Evaluator.available(self.task)
        if every is None:
            return None
        return Evaluator(self.task, samples_of(available, every, self.config.samples, self.config.evaluate_samples))

    def _start_from(self, folder: Path) -> None:
        """Take the weights of a finished training, and its model as the teacher where one is wanted."""
        trained, _, vocabulary = trained_model(folder)
        if None not in (vocabulary, self.task.vocabulary) and vocabulary != self.task.vocabulary:
            raise KronblocksError(f"the model in {folder} knows other characters than {self.task.source['title']}: use its text")
        densify_(trained)
        try:
            self.model.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            raise KronblocksError(
                f"{folder} holds no {self.config.model} for {self.config.data}: give the --model and --data it was trained with"
            ) from error
        if self.config.distill is not None:
            self._teacher_macs = accounting.MacCounter(trained, self.task.example).inference_macs()
            self.distillation = Distillation(trained, weight=self.config.distill)

    def configure_optimizers(self) -> Any:
        course = self.config.course
        groups = parameter_groups(self.model, **self.config.recipe._asdict())
        optimizer = AdamW(groups, betas=(0.9, course.beta2), fused=True)
        self.sparsifier.attach(optimizer, total_steps=self.total_steps)

        def factor(step: int) -> float:
            return learning_rate_factor(step, self.total_steps, course.warm_up, course.final_lr)

        schedule = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @abstractmethod
    def training_loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, without the sparsifier's penalty."""

    @abstractmethod
    def evaluate(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy of a batch."""

    def results(self, test_loss: float) -> dict[str, Any]:
        """What result.json holds beside what all trainings measure."""
        return {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, labels = self.task.augmented(batch, self.config.seed, self.current_epoch, batch_idx)
        if self._measure:
            with accounting.saved_tensor_bytes(self.model) as saved:
                loss = self._loss(inputs, labels)
            self._keep_most(saved)
        else:
            loss = self._loss(inputs, labels)
        if len(inputs) not in self._step_macs:
            self._step_macs[len(inputs)] = self.counter.training_macs(len(inputs))
        self.macs += self._step_macs[len(inputs)] + self._teacher_macs * len(inputs)
        if self.sparsifier.measures_growth:
            weights = {target.name: target.grid.weights for target in self.sparsifier.targets}
            self.macs += self.counter.growth_macs(len(inputs), weights)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs), prog_bar=True)
        return loss

    def _loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return self.training_loss(inputs, labels) + self.sparsifier.penalty()

    def _keep_most(self, measured: dict[str, int]) -> None:
        for name, value in measured.items():
            self.most_bytes[name] = max(value, self.most_bytes.get(name, 0))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.config.course.clip is not None:  # Lightning's own clipping refuses fused optimisers in bf16
            nn.utils.clip_grad_norm_(self.parameters(), self.config.course.clip)

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
        if self.config.evaluate_every and (step % self.config.evaluate_every == 0 or step == self.total_steps):
            self._evaluate_between(step)

    def _evaluate_between(self, step: int) -> None:
        """Add a point to the curve of quality over time; the clock stands meanwhile."""
        assert self._evaluator is not None
        self.clock.stop()
        with self.trainer.precision_plugin.val_step_context():
            loss, accuracy = self._evaluator(self.model, self.evaluate)
        self.evaluations.append(
            {
                "step": step,
                **self._spent(),
                "validation_loss": accounting.finite(loss),
                "validation_accuracy": accounting.finite(accuracy),
                "block_sparsity": self.sparsifier.report().block_sparsity,
            }
        )
        self.clock.start()

    def _spent(self) -> dict[str, Any]:
        """What the training has cost so far."""
        return {"seconds": self.clock.seconds, "cpu_seconds": self.clock.cpu_seconds, "training_macs": self.macs}

    def on_train_epoch_start(self) -> None:
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None
        self.clock.start()

    def on_validation_start(self) -> None:
        self.clock.stop()

    def on_validation_end(self) -> None:
        self.clock.start()

    def _evaluate(self, batch: list[Tensor], name: str) -> None:
        loss, accuracy = self.evaluate(*batch)
        self.log(f"{name}_loss", loss, batch_size=len(batch[0]), prog_bar=self.config.is_text)
        self.log(f"{name}_accuracy", accuracy, batch_size=len(batch[0]), prog_bar=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "validation")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_train_epoch_end(self) -> None:
        self.clock.stop()
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
                **self._spent(),
                "trainable_parameters": accounting.trainable_parameters(self.model),
            }
        )

    _METERS = ("evaluations", "macs", "history", "most_bytes", "parameters_max", "_measure")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sparsifier"] = self.sparsifier.state_dict()
        checkpoint["meters"] = {name: getattr(self, name) for name in self._METERS}
        checkpoint["meters"]["clock"] = self.clock.state()
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.sparsifier.load_state_dict(checkpoint["sparsifier"])
        for name in self._METERS:
            setattr(self, name, checkpoint["meters"].get(name, getattr(self, name)))
        self.clock.load(checkpoint["meters"].get("clock", {"seconds": checkpoint["meters"].get("seconds", 0.0)}))
        self._random_state = checkpoint["random_state"]
