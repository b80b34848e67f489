"""Block-sparse training in transformers' Trainer: one callback, and a Trainer that learns from a trained model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kronblocks.algorithms.training.distillation import Distillation
from kronblocks.algorithms.training.sparsifier import Sparsifier
from kronblocks.config.sparsity import SparsityConfig
from kronblocks.core.errors import KronblocksError, OtherSteps
from kronblocks.surgery.sparsify import sparsify_


class SparsityCallback(TrainerCallback):
    """Makes a Trainer's model block-sparse: `Trainer(model, args, ..., callbacks=[SparsityCallback(SparsityConfig(...))])`.

    Layers are replaced when the Trainer is made, before it makes its optimiser. The gradient of the penalty, of methods that have
    one, is added before each optimiser step, after clipping. Checkpoints hold the state (as the tensor "kronblocks_state" among
    the weights), so that `trainer.train(resume_from_checkpoint=...)` goes on to the same bits. Logs get "block_sparsity", counted
    from the weights; loggers see it if they come after this callback: `report_to="none", callbacks=[SparsityCallback(...),
    TensorBoardCallback()]`. After the training `kronblocks.save_pretrained(trainer.model, folder)` saves the model.

    A Trainer that makes its models itself, as for `hyperparameter_search`, is given a function that makes them block-sparse:
    `Trainer(model_init=callback.model_init(make_model), ..., callbacks=[callback])`.

    Args:
        config: what `sparsify_` gets, or a function that gives it for a trial of a hyperparameter search (None outside of one),
            or a `Sparsifier` made for the same model: the Trainer may then be given `optimizers=`, made from
            `kronblocks.parameter_groups`.

    Attributes:
        sparsifier: of the model that the Trainer made or was given last.
    """

    def __init__(self, config: SparsityConfig | Callable[[Any], SparsityConfig] | Sparsifier | None = None) -> None:
        self._given = config if isinstance(config, Sparsifier) else None
        self.sparsifier: Sparsifier | None = self._given
        self.config: Any = SparsityConfig() if config is None or self._given is not None else config
        self._attachment: Any = None
        self._carried: Any = None

    def model_init(self, make: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
        """What `Trainer(model_init=...)` gets: each model that it makes is block-sparse before it gets an optimiser.

        Args:
            make: makes a dense model, from nothing or from the trial of a hyperparameter search, as `model_init` does.

        Raises:
            KronblocksError: the callback was given a Sparsifier, which has one model.
        """
        if self._given is not None:
            raise KronblocksError("a Sparsifier is of one model, and model_init makes several: give SparsityCallback(config)")

        def model_init(trial: Any) -> nn.Module:
            self._forget()  # so that the memory of the model before is free for the next one
            model = make(trial) if inspect.signature(make).parameters else make()
            self._sparsify(model, trial)
            return model

        return model_init

    def _sparsify(self, model: nn.Module, trial: Any) -> None:
        config: Any = self.config(trial) if callable(self.config) else self.config
        self.sparsifier = sparsify_(model, config)
        self._carried = self.sparsifier.save_with_model()

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Replace the layers."""
        if self._given is None and self.sparsifier is not None and self.sparsifier.model is not model:
            self._forget()  # the callback has been given to another Trainer, as in cross-validation
        if self.sparsifier is None:
            if kwargs.get("optimizer") is not None:
                raise KronblocksError(
                    "the optimiser given to the Trainer holds the dense weights, which are replaced now: make the sparsifier "
                    "first, sparsifier = kronblocks.sparsify_(model, config), then the optimiser, and give "
                    "SparsityCallback(sparsifier)"
                )
            self._sparsify(model, None)
        elif self.sparsifier.model is not model:
            raise KronblocksError("the sparsifier is of another model than the Trainer's: give sparsify_ the Trainer's model")
        elif self._carried is None:
            self._carried = self.sparsifier.save_with_model()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Follow the optimiser."""
        sparsifier = self._ready()
        if sparsifier.model is not model:
            raise KronblocksError(
                "SparsityCallback last replaced layers of another model than the Trainer's: give the Trainer "
                "model_init=callback.model_init(make_model), or model=, and Trainers that exist at once a callback each"
            )
        self._let_go()
        if (sparsifier.step == 0) != (state.global_step == 0) and sparsifier.phase != "heal":
            what = (
                "make a new model and Trainer for a new training" if sparsifier.step else "the checkpoint has none of its states"
            )
            raise KronblocksError(
                f"the Trainer begins at step {state.global_step}, but the sparsifier is at step {sparsifier.step}: {what}"
            )
        self._carried.remove()
        self._carried = sparsifier.save_with_model()
        try:
            self._attachment = sparsifier.attach(kwargs["optimizer"], total_steps=state.max_steps, add_penalty=True)
        except OtherSteps as error:
            raise KronblocksError(
                f"{error.what}: write max_steps={error.known} in TrainingArguments, or the num_train_epochs that give it, or go "
                f"on for longer from a checkpoint of step {error.end} or later, when the mask is frozen"
            ) from error

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs: Any = None, **kwargs: Any
    ) -> None:
        """Log what is so."""
        found = {"block_sparsity": self._ready().sparsity}
        if self._attachment is not None and logs is not None:
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the optimiser go, and say so if the model is less sparse than it was meant to be."""
        sparsifier = self._ready()
        best = f"the best checkpoint, {state.best_model_checkpoint}, was loaded"
        sparsifier.warn_if_too_dense(best if args.load_best_model_at_end else "it ended early")
        self._let_go()
        self._carried.stop_saving()

    def _ready(self) -> Sparsifier:
        if self.sparsifier is None:
            raise KronblocksError("SparsityCallback was added to a Trainer that exists already: give it in callbacks=[...]")
        return self.sparsifier

    def _forget(self) -> None:
        self._let_go()
        if self._carried is not None:
            self._carried.remove()
        self.sparsifier = self._carried = None

    def _let_go(self) -> None:
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None


class DistillingTrainer(Trainer):
    """transformers' Trainer with a trained model in its loss: `DistillingTrainer(model, args, ..., distillation=...)`.

    The loss of every batch is its mean, and where gradients are accumulated the batches of a step count alike.

    Args:
        distillation: made before the model's layers were replaced, so that it holds the dense model.
        settings: what a Trainer takes, by name or in its order.
    """

    def __init__(self, *settings: Any, distillation: Distillation, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.distillation = distillation
        self.model_accepts_loss_kwargs = False  # which would divide the loss of labels, and it alone, by all items of a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # what the Trainer calls
        """The loss to train on, and the outputs if wanted."""
        loss, outputs = super().compute_loss(model, inputs, True)
        loss = self.distillation(loss, outputs, **inputs)
        return (loss, outputs) if return_outputs else loss
