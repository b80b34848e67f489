"""A Lightning callback for block-sparse training."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kronblocks.algorithms.training.attachment import Attachment
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError, OtherSteps
from kronblocks.core.shards import is_sharded
from kronblocks.deploy.loading import HINT, rebuild_on_load_
from kronblocks.integrations.averages import Averages, check_function, check_order
from kronblocks.surgery.records import apply_structure_
from kronblocks.surgery.sparsify import sparsify_

_KEY = "kronblocks"


class SparsityCallback(Callback):
    """Makes a LightningModule block-sparse: `Trainer(callbacks=[SparsityCallback(SparsityConfig(...))])`.

    It replaces layers before `configure_optimizers`; make the optimiser there from `kronblocks.parameter_groups(self, lr=...)`.
    It adds the penalty, if the method has one, to what `training_step` returns. After each epoch it logs "block_sparsity",
    counted from the weights, and "phase" (0 discover, 1 refine, 2 heal).

    Checkpoints hold the state: `fit(..., ckpt_path=...)` goes on to the same bits, and `test` and `predict` load them too.
    For `load_from_checkpoint`, or without the callback, end the module's `__init__` with `kronblocks.rebuild_on_load_(self)`.
    A second model, as in cross-validation, is made block-sparse like the first. List averages of weights after this callback:
    they begin again when layers are replaced or blocks exchanged, and when healing begins, so they end with the same zeros.

    Args:
        config: what `sparsify_` gets.
        total_steps: of the whole training; None: the trainer's estimate.

    Attributes:
        sparsifier: of the model that was set up last.
    """

    def __init__(self, config: SparsityConfig | None = None, *, total_steps: int | None = None) -> None:
        self.config, self.total_steps = config or SparsityConfig(), total_steps
        self.sparsifier: Sparsifier | None = None
        self._attachment: Attachment | None = None
        self._averages: Averages | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the layers, once per model."""
        if _wrap(pl_module, "on_load_checkpoint", lambda load: self._loading(pl_module, load)):
            rebuild_on_load_(pl_module)
        if stage != "fit":
            return
        check_order(trainer, self)
        if not self._follows(pl_module):
            self._let_go()
            self.sparsifier = sparsify_(pl_module, self.config)
            self._averages = Averages(self.sparsifier)
            _wrap(pl_module, "on_save_checkpoint", functools.partial(_with_state, self.sparsifier))
            if self.sparsifier.rule.has_penalty:
                _wrap(pl_module, "training_step", functools.partial(_with_penalty, pl_module, self.sparsifier))

    def _follows(self, module: LightningModule) -> bool:
        return self.sparsifier is not None and self.sparsifier.model is module

    def _loading(self, module: LightningModule, load: Callable[..., Any]) -> Callable[..., Any]:
        """After the module's own load hook, restore the structure, so that the weights fit."""

        def restore(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get(_KEY)
            if state is None:
                raise KronblocksError("the checkpoint is of a training without SparsityCallback: leave ckpt_path= out")
            if self.sparsifier is None or self.sparsifier.model is not module:
                apply_structure_(module, state["structure"])
            elif self.sparsifier.step != state["step"]:
                assert self._averages is not None
                self.sparsifier.load_state_dict(state)
                self._averages.begin(module.trainer, module)  # with the layers of the checkpoint's averages
            load(checkpoint)

        return restore

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimisers."""
        assert self.sparsifier is not None and self._averages is not None
        if self.sparsifier.rule.has_penalty and not pl_module.automatic_optimization:
            raise KronblocksError(
                "the method has a penalty, which SparsityCallback adds to the result of training_step, but manual optimisation "
                "returns nothing: set automatic_optimization = True, or choose a method without a penalty"
            )
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if steps == float("inf"):
            raise KronblocksError(
                "the trainer has no end (max_epochs=-1 or max_time), but the schedule needs one: set max_epochs or max_steps, or "
                "write SparsityCallback(config, total_steps=...)"
            )
        if not trainer.optimizers:
            raise KronblocksError("configure_optimizers returned no optimiser, so there are no steps to follow")
        self._let_go()
        try:
            self._attachment = self.sparsifier.attach(trainer.optimizers, total_steps=int(steps))
        except OtherSteps as error:
            raise KronblocksError(
                f"{error.what}: set the trainer's max_steps={error.known}, or the max_epochs that give it, or go on for longer "
                f"from a checkpoint of step {error.end} or later, when the mask is frozen"
            ) from error

        if any(not target.is_plain for target in self.sparsifier.targets):
            check_function(trainer)
        self._averages.note()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Restart averages of weights if the model has changed."""
        assert self._averages is not None
        self._averages.follow(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detach from the optimisers, and warn if the model is less sparse than its target."""
        assert self.sparsifier is not None
        self.sparsifier.warn_if_too_dense("it ended early")
        self._let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach from the optimisers, so that the same model can be given to `fit` again."""
        self._let_go()

    def _let_go(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log sparsity and phase."""
        assert self.sparsifier is not None
        phases = ("discover", "refine", "heal")
        pl_module.log("block_sparsity", self.sparsifier.sparsity)
        pl_module.log("phase", float(phases.index(self.sparsifier.phase)))


def _with_state(sparsifier: Sparsifier, save: Callable[..., Any]) -> Callable[..., Any]:
    """A save hook that also adds the state. Lightning calls it for checkpoints of weights only, too."""

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        state = checkpoint[_KEY] = sparsifier.state_dict()
        if state["structure"]["layers"] and not any(is_sharded(p) for p in sparsifier.model.parameters()):
            weights = checkpoint["state_dict"]
            weights[HINT] = torch.zeros(0)  # the first name in the error of a plain model that loads this
            if isinstance(weights, OrderedDict):
                weights.move_to_end(HINT, last=False)
        save(checkpoint)

    return on_save_checkpoint


def _with_penalty(module: LightningModule, sparsifier: Sparsifier, step: Callable[..., Any]) -> Callable[..., Any]:
    def training_step(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        if not module.trainer.training:  # called by validation_step, as for a loss that can be compared
            return output
        if isinstance(output, Tensor):
            return output + sparsifier.penalty()
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            return {**output, "loss": output["loss"] + sparsifier.penalty()}
        return output

    return training_step


def _wrap(module: LightningModule, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
    """Wrap a method of this one module, once. Whether it was done now."""
    method = getattr(module, name)
    if getattr(method, _KEY, False):
        return False
    new = functools.wraps(method)(make(method))
    setattr(new, _KEY, True)
    setattr(module, name, new)
    return True
