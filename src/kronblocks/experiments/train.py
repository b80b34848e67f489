"""One training on Lightning, from a `TrainConfig` to a folder with result.json."""

from __future__ import annotations

import logging
import math
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import safetensors.torch
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import kronblocks
from kronblocks.experiments import accounting
from kronblocks.experiments.data import BatchSampler, Dataset, load_data, loader
from kronblocks.experiments.models import build_model
from kronblocks.experiments.runs import RunFolder, write_json
from kronblocks.experiments.tasks import TrainConfig
from kronblocks.groups import parameter_groups
from kronblocks.selection import select
from kronblocks.sparsity.report import SparsityReport, count_blocks
from kronblocks.sparsity.targets import WeightTarget
from kronblocks.surgery import sparsify_, structure

RESULT_VERSION = 1
WARM_UP = 0.1


def learning_rate_factor(step: int, total_steps: int) -> float:
    """Linear warm-up over the first tenth, then a cosine to 0."""
    warm = WARM_UP * total_steps
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0.0, step - warm) / (total_steps - warm))))


class Classification(LightningModule):
    """A classifier that a sparsifier follows, and what its training costs, counted."""

    def __init__(self, config: TrainConfig, data: Dataset) -> None:
        super().__init__()
        self.config = config
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, data.image_shape, data.classes, config.widths)
        self.sparsifier = sparsify_(self.model, config.sparsity_config())
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

    def configure_optimizers(self) -> Any:
        recipe = self.config.recipe
        groups = parameter_groups(
            self.model, lr=recipe.lr, weight_decay=recipe.weight_decay, factor_weight_decay=recipe.factor_weight_decay
        )
        optimizer = AdamW(groups)
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
        self.macs += self._step_macs[len(images)]
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(images), prog_bar=True)
        return loss

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(images), labels) + self.sparsifier.penalty()

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
        if schedule.start_step <= step <= schedule.end_step:
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


class EpochLines(Callback):
    """One line an epoch, for where no progress bar can be drawn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        Console(stderr=True).print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}", highlight=False)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "kronblocks": kronblocks.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _quiet() -> None:
    """Lightning's remarks on machines that are not this one."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def _trainer(config: TrainConfig, folder: RunFolder) -> Trainer:
    checkpoint = ModelCheckpoint(folder.checkpoints, filename="{epoch}", save_top_k=1, save_on_train_epoch_end=True)
    draws = config.progress and Console(stderr=True).is_terminal
    lines = [] if draws or not config.progress else [EpochLines()]
    return Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=config.epochs,
        logger=[
            CSVLogger(folder.path, name="csv", version=folder.attempt),
            TensorBoardLogger(folder.path, name="tensorboard", version=folder.attempt),
        ],
        callbacks=[checkpoint, *([RichProgressBar()] if draws else lines)],
        enable_progress_bar=draws,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=50,
        deterministic="warn",
    )


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training, or go on with one, and return what result.json holds.

    Raises:
        KronblocksError: the folder is in use or holds another training, data or checkpoint cannot be read, or the settings do
            not fit the model. Nothing has been written to the folder then that a second try would stumble over.
    """
    _quiet()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config.data, data_dir=config.data_dir)
    memory = accounting.PeakMemory()
    module = Classification(config, data)
    with RunFolder.open(config) as folder:
        if folder.result is not None:
            return folder.result
        trainer = _trainer(config, folder)
        train_batches = loader(data.train, BatchSampler(len(data.train), config.batch_size, config.seed))
        validation = loader(data.validation, BatchSampler(len(data.validation), 1000, 0, shuffle=False))
        test = loader(data.test, BatchSampler(len(data.test), 1000, 0, shuffle=False))
        trainer.fit(module, train_batches, validation, ckpt_path=folder.last_checkpoint(), weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        peak = memory.bytes()
        tested = trainer.test(module, test, verbose=False)[0]
        result = _result(config, module, tested, peak, memory.exact)
        _save_model(module, folder)
        write_json(folder.path / "result.json", result)
    return result


def _save_model(module: Classification, folder: RunFolder) -> None:
    """The trained weights and the masks, beside the result."""
    state = {name: value.contiguous() for name, value in module.model.state_dict().items()}
    safetensors.torch.save_file(state, folder.path / "model.safetensors")
    masks = {target.name: target.mask.to(torch.uint8).contiguous() for target in module.sparsifier.targets}
    safetensors.torch.save_file(masks, folder.path / "masks.safetensors")


def _count(config: TrainConfig, module: Classification) -> SparsityReport:
    """Zero blocks of the targeted layers; of the dense method, of those that a sparse method would target."""
    if module.sparsifier.targets:
        return module.sparsifier.report()
    layers = [(each, module.model.get_submodule(each.name)) for each in select(module.model, config.sparsity_config()).selected]
    return count_blocks([WeightTarget(each.name, layer, each.grid) for each, layer in layers if isinstance(layer, nn.Linear)])


def _result(config: TrainConfig, module: Classification, tested: Any, peak: int, exact: bool) -> dict[str, Any]:
    report = _count(config, module)
    last = module.history[-1]
    surgery = module.sparsifier.surgery
    return {
        "version": RESULT_VERSION,
        "test_accuracy": tested["test_accuracy"],
        "test_loss": accounting.finite(tested["test_loss"]),
        "validation_accuracy": last["validation_accuracy"],
        "validation_loss": last["validation_loss"],
        "block_sparsity": report.block_sparsity,
        "live_blocks": report.live_blocks,
        "total_blocks": report.total_blocks,
        "train_seconds": module.seconds,
        "peak_memory_bytes": peak,
        "peak_memory_exact": exact,
        "bytes": module.most_bytes,
        "trainable_parameters_start": module.parameters_start,
        "trainable_parameters_max": module.parameters_max,
        "trainable_parameters_end": accounting.trainable_parameters(module.model),
        "training_macs": module.macs,
        "inference_macs_per_sample": module.counter.inference_macs(config.batch_size) // config.batch_size,
        "layers": report.to_dict()["layers"],
        "surgery": {
            "selected": [{"name": each.name, "block_size": str(each.grid.block), "note": each.note} for each in surgery.selected],
            "left_dense": [{"name": each.name, "reason": each.reason} for each in surgery.left_dense],
        },
        "structure": structure(module.model),
        "history": module.history,
        "config": config.settings(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
