"""One training on Lightning, from a `TrainConfig` to a folder with result.json."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console

from kronblocks.algorithms.training.report import SparsityReport, count_blocks
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json, write_json
from kronblocks.deploy.saving import save_pretrained
from kronblocks.search.report import SearchReport
from kronblocks.surgery.records import structure
from kronblocks.surgery.selection import select
from kronblocks.surgery.sparsify import schedule_of, weight_targets
from kronblocks_lab.training import accounting
from kronblocks_lab.training.budget import fit_to_budget_
from kronblocks_lab.training.classifier import Classification
from kronblocks_lab.training.language import LanguageModelling
from kronblocks_lab.training.module import Training
from kronblocks_lab.training.runs import RunFolder
from kronblocks_lab.training.searching import check_candidates, search_for
from kronblocks_lab.training.settings import RESULT_VERSION, TrainConfig
from kronblocks_lab.training.tasks import ImageTask, Task, TextTask, task_of
from kronblocks_lab.training.versions import versions


class EpochLines(Callback):
    """One line an epoch, for where no progress bar can be drawn."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {shown}"
        Console(stderr=True).print(line, highlight=False, soft_wrap=True)


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


def _trainer(config: TrainConfig, folder: RunFolder, task: Task) -> Trainer:
    checkpoint = ModelCheckpoint(folder.checkpoints, filename="{epoch}", save_top_k=1, save_on_train_epoch_end=True)
    draws = config.progress and Console(stderr=True).is_terminal
    lines = [] if draws or not config.progress else [EpochLines()]
    return Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=task.epochs,
        limit_train_batches=task.epoch_steps,
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
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
    )


def train(config: TrainConfig) -> dict[str, Any]:
    """Run a training, or go on with one, and return what result.json holds.

    Raises:
        KronblocksError: the folder is in use or holds another training, data or checkpoint cannot be read, or the settings do
            not fit the model. Nothing has been written to the folder then that a second try would stumble over.
    """
    _quiet()
    config.import_plugins()
    config.use_threads()
    task = task_of(config, config.fold)
    memory = accounting.PeakMemory()
    schedule = schedule_of(config.sparsity_config())(task.steps)
    if config.budget_seconds is None and not schedule.prunes:
        raise KronblocksError(f"{schedule.why_not}: train longer")
    module = None if config.block_size == "auto" else _module(config, task)
    if module is None:
        check_candidates(config, task)
    with RunFolder.open(config) as folder, _writing_into(folder.path):
        if folder.result is not None:
            return folder.result
        search, budget = None, _budget(config, task, folder)
        if budget is not None:
            module, memory = _module(config, task), accounting.PeakMemory()
        if module is None:
            search = _search(config, task, folder)
            module = _module(config, task, search.config(config.sparsity_config()))
        trainer = _trainer(config, folder, task)
        batches = (task.train_batches(config.seed), task.validation_batches())
        trainer.fit(module, *batches, ckpt_path=folder.last_checkpoint(), weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
        peak = memory.bytes()
        tested = trainer.test(module, task.test_batches(), verbose=False)[0]
        result = _result(config, module, tested, peak, memory.exact)
        if search is not None:
            result["search"] = search.to_dict()
        if budget is not None:
            result["budget"] = budget
        _save_model(module, folder, result)
        write_json(folder.path / "result.json", result)
    return result


def _module(config: TrainConfig, task: ImageTask | TextTask, sparsity: SparsityConfig | None = None) -> Training:
    kind = Classification if isinstance(task, ImageTask) else LanguageModelling
    return kind(config, task, sparsity)


def _budget(config: TrainConfig, task: ImageTask | TextTask, folder: RunFolder) -> dict[str, Any] | None:
    """How long to train, which the task then does; a folder in which no step was made is left as it was if that fails."""
    try:
        return fit_to_budget_(task, config, folder.path, _module)
    except KronblocksError:
        if folder.last_checkpoint() is None:
            folder.forget()
        raise


@contextlib.contextmanager
def _writing_into(path: Path) -> Iterator[None]:
    """A full disk, or a folder that is taken away, is one clear error."""
    try:
        yield
    except OSError as error:
        raise KronblocksError(
            f"cannot write into {path}: {error.strerror or error}; make room and add --resume: what is finished is kept"
        ) from error


def _search(config: TrainConfig, task: Task, folder: RunFolder) -> SearchReport:
    """The block-size search, or what an earlier start of this training found."""
    known = folder.path / "search.json"
    if not known.exists():
        write_json(known, search_for(config, task).to_dict())
    return SearchReport.from_dict(read_json(known))


def _save_model(module: Training, folder: RunFolder, result: dict[str, Any]) -> None:
    """The trained model in a folder, and the masks, beside the result."""
    words = {"data": module.config.data, "test accuracy": f"{result['test_accuracy']:.4f}"}
    words |= {"test loss": f"{result['test_loss']:.4f}"} if module.config.is_text and result["test_loss"] is not None else {}
    words |= module.task.card
    save_pretrained(
        module.model, folder.path / "model", config=module.sparsity_config, metadata=words, sparsifier=module.sparsifier
    )
    masks = {target.name: target.mask.to(torch.uint8).contiguous() for target in module.sparsifier.targets}
    safetensors.torch.save_file(masks, folder.path / "masks.safetensors")


def _count(config: TrainConfig, module: Training) -> SparsityReport:
    """Zero blocks of the targeted layers; of the dense method, of those that a sparse method would target."""
    if module.sparsifier.targets:
        return module.sparsifier.report()
    return count_blocks(weight_targets(module.model, select(module.model, module.sparsity_config)))


def _result(config: TrainConfig, module: Training, tested: Any, peak: int, exact: bool) -> dict[str, Any]:
    report = _count(config, module)
    last = module.history[-1]
    live = {layer.name: layer.live_blocks / layer.total_blocks for layer in report.layers}
    surgery = module.sparsifier.surgery
    return {
        "version": RESULT_VERSION,
        "source": module.task.source,
        "test_accuracy": tested["test_accuracy"],
        "test_loss": accounting.finite(tested["test_loss"]),
        "validation_accuracy": last["validation_accuracy"],
        "validation_loss": last["validation_loss"],
        "block_sparsity": report.block_sparsity,
        "live_blocks": report.live_blocks,
        "total_blocks": report.total_blocks,
        "train_seconds": module.clock.seconds,
        "clock": module.clock.result(torch.get_num_threads()),
        "peak_memory_bytes": peak,
        "peak_memory_exact": exact,
        "bytes": module.most_bytes,
        "trainable_parameters_start": module.parameters_start,
        "trainable_parameters_max": module.parameters_max,
        "trainable_parameters_end": accounting.trainable_parameters(module.model),
        "training_macs": module.macs,
        "inference_macs_per_sample": module.counter.inference_macs(config.samples, live) // config.samples,
        "attention_macs_per_sample": module.counter.attention_macs,
        "layers": report.to_dict()["layers"],
        "surgery": {
            "selected": [{"name": each.name, "block_size": str(each.grid.block), "note": each.note} for each in surgery.selected],
            "left_dense": [{"name": each.name, "reason": each.reason} for each in surgery.left_dense],
        },
        "structure": structure(module.model),
        "history": module.history,
        "evaluations": module.evaluations,
        "config": config.settings(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **module.results(tested["test_loss"]),
    }
