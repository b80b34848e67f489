"""A callback for block-sparse training in transformers' Trainer, and a Trainer with distillation."""

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
from kronblocks.deploy.cards import note_scores
from kronblocks.surgery.sparsify import sparsify_


class SparsityCallback(TrainerCallback):
    """Makes a Trainer's model block-sparse: `Trainer(model, args, ..., callbacks=[SparsityCallback(SparsityConfig(...))])`.

    It replaces layers when the Trainer is made, before that makes its optimiser. If the method has a penalty, its gradient is
    added before each optimiser step, after clipping. Checkpoints hold the state (the tensor "kronblocks_state" among the
    weights): `trainer.train(resume_from_checkpoint=...)` goes on to the same bits. Logs get "block_sparsity", counted from the
    weights. List loggers after this callback: `report_to="none", callbacks=[SparsityCallback(...), TensorBoardCallback()]`.
    After the training, `trainer.save_model(folder)` saves the model, and `AutoModel*.from_pretrained(folder)` loads it once
    kronblocks is imported.

    If the Trainer makes its models, as for `hyperparameter_search`, write
    `Trainer(model_init=callback.model_init(make_model), ..., callbacks=[callback])`.

    Args:
        config: what `sparsify_` gets; or a function from a trial of a hyperparameter search (None outside of one) to it; or a
            `Sparsifier` made for the same model, so that you can make the Trainer's `optimizers=` by `parameter_groups`.

    Attributes:
        sparsifier: of the Trainer's last model.
    """

    def __init__(self, config: SparsityConfig | Callable[[Any], SparsityConfig] | Sparsifier | None = None) -> None:
        self._given = config if isinstance(config, Sparsifier) else None
        self.sparsifier: Sparsifier | None = self._given
        self.config: Any = SparsityConfig() if config is None or self._given is not None else config
        self._attachment: Any = None
        self._carried: Any = None

    def model_init(self, make: Callable[..., nn.Module]) -> Callable[[Any], nn.Module]:
        """A function for `Trainer(model_init=...)`: it makes each model block-sparse before it gets an optimiser.

        Args:
            make: makes a dense model, without arguments or from a trial, as for `model_init`.

        Raises:
            KronblocksError: the callback was made with a Sparsifier, which has one model.
        """
        if self._given is not None:
            raise KronblocksError("a Sparsifier has one model, but model_init makes several: give SparsityCallback(config)")

        def model_init(trial: Any) -> nn.Module:
            self._forget()  # free the memory of the previous model
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
            self._forget()  # another Trainer has the callback now, as in cross-validation
        if self.sparsifier is None:
            if kwargs.get("optimizer") is not None:
                raise KronblocksError(
                    "the optimiser given to the Trainer holds the dense weights, which are replaced now: make the sparsifier "
                    "first, sparsifier = kronblocks.sparsify_(model, config), then the optimiser, and write "
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
        """Attach to the optimiser."""
        sparsifier = self._ready()
        if sparsifier.model is not model:
            raise KronblocksError(
                "SparsityCallback last replaced layers of another model than the Trainer's: give the Trainer "
                "model_init=callback.model_init(make_model), or model=. Trainers that exist at once need a callback each"
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
        """Log the sparsity."""
        found = {"block_sparsity": self._ready().sparsity}
        if self._attachment is not None and logs is not None:
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember the model's scores for its card."""
        speed = ("_runtime", "_per_second", "epoch")
        note_scores(model, {name: value for name, value in (metrics or {}).items() if not name.endswith(speed)})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Detach from the optimiser, and warn if the model is less sparse than its target."""
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
    """transformers' Trainer with a teacher in its loss: `DistillingTrainer(model, args, ..., distillation=...)`.

    The loss of a batch is its mean, and accumulated batches of a step count equally.

    Args:
        distillation: made before the model's layers were replaced, so that it holds the dense model.
        settings: a Trainer's arguments.
    """

    def __init__(self, *settings: Any, distillation: Distillation, **named: Any) -> None:
        super().__init__(*settings, **named)
        self.distillation = distillation
        self.model_accepts_loss_kwargs = False  # True divides only the labels' loss by the number of items in a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # what the Trainer calls
        """The loss to train on, and the outputs if requested."""
        loss, outputs = super().compute_loss(model, inputs, True)
        loss = self.distillation(loss, outputs, **inputs)
        return (loss, outputs) if return_outputs else loss
