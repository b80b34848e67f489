"""Block-sparse training in Lightning: one callback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kronblocks.config import SparsityConfig
from kronblocks.errors import KronblocksError
from kronblocks.records import apply_structure_
from kronblocks.sparsity.sparsifier import Sparsifier
from kronblocks.surgery import sparsify_

_KEY = "kronblocks"


class SparsityCallback(Callback):
    """Makes a LightningModule block-sparse: `Trainer(callbacks=[SparsityCallback(SparsityConfig(...))])`.

    Layers are replaced before `configure_optimizers`, which makes its optimisers as always, best from
    `kronblocks.parameter_groups(self, lr=...)`. The penalty of methods that have one is added to what `training_step` returns.
    "block_sparsity", counted from the weights, and "phase" (0 discover, 1 refine, 2 heal) are logged after each epoch.
    Checkpoints hold the state; `fit(..., ckpt_path=...)` goes on to the same bits, and `test` and `predict` load them too.

    Args:
        config: what `sparsify_` gets.
        total_steps: of the whole training; None: what the trainer estimates.

    Attributes:
        sparsifier: once the training has been set up.
    """

    def __init__(self, config: SparsityConfig | None = None, *, total_steps: int | None = None) -> None:
        self.config, self.total_steps = config or SparsityConfig(), total_steps
        self.sparsifier: Sparsifier | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the layers, once."""
        _wrap(pl_module, "on_load_checkpoint", lambda load: self._loading(pl_module, load))
        if stage == "fit" and self.sparsifier is None:
            self.sparsifier = sparsify_(pl_module, self.config)
            if self.sparsifier.rule.has_penalty:
                _wrap(pl_module, "training_step", self._with_penalty)

    def _loading(self, module: LightningModule, load: Callable[..., Any]) -> Callable[..., Any]:
        """The structure comes before the weights, which are loaded after the module's own hook."""

        def restore(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get(_KEY)
            if state is None:
                raise KronblocksError("the checkpoint is of a training without SparsityCallback: leave ckpt_path= out")
            if self.sparsifier is None:
                apply_structure_(module, state["structure"])
            elif self.sparsifier.step != state["step"]:
                self.sparsifier.load_state_dict(state)
            load(checkpoint)

        return restore

    def _with_penalty(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            assert self.sparsifier is not None
            if isinstance(output, Tensor):
                return output + self.sparsifier.penalty()
            if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
                return {**output, "loss": output["loss"] + self.sparsifier.penalty()}
            return output

        return training_step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimisers."""
        assert self.sparsifier is not None
        if self.sparsifier.rule.has_penalty and not pl_module.automatic_optimization:
            raise KronblocksError(
                "the method has a penalty, which SparsityCallback adds to what training_step returns, and manual optimisation "
                "returns nothing: set automatic_optimization = True, or choose a method without a penalty"
            )
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if steps == float("inf"):
            raise KronblocksError(
                "the trainer has no end (max_epochs=-1 or max_time), and the schedule needs one: set max_epochs or max_steps, or "
                "give SparsityCallback(config, total_steps=...)"
            )
        if not trainer.optimizers:
            raise KronblocksError("configure_optimizers returned no optimiser, so there are no steps to follow")
        self._attachment = self.sparsifier.attach(trainer.optimizers, total_steps=int(steps))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the optimisers go, and say so if the model is less sparse than it was meant to be."""
        assert self.sparsifier is not None
        self.sparsifier.warn_if_too_dense("it ended early")
        self._attachment.remove()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is so."""
        assert self.sparsifier is not None
        phases = ("discover", "refine", "heal")
        pl_module.log("block_sparsity", self.sparsifier.sparsity)
        pl_module.log("phase", float(phases.index(self.sparsifier.phase)))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the state into the checkpoint."""
        if self.sparsifier is not None:
            checkpoint[_KEY] = self.sparsifier.state_dict()


def _wrap(module: LightningModule, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around a method of this one module, once."""
    method = getattr(module, name)
    if not getattr(method, _KEY, False):
        new = functools.wraps(method)(make(method))
        setattr(new, _KEY, True)
        setattr(module, name, new)
