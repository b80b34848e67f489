"""Block-sparse training in transformers' Trainer: one callback, and a Trainer that learns from a trained model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kronblocks.config import SparsityConfig
from kronblocks.distillation import Distillation
from kronblocks.errors import KronblocksError
from kronblocks.sparsity.sparsifier import Sparsifier
from kronblocks.surgery import sparsify_


class SparsityCallback(TrainerCallback):
    """Makes a Trainer's model block-sparse: `Trainer(model, args, ..., callbacks=[SparsityCallback(SparsityConfig(...))])`.

    Layers are replaced when the Trainer is made, before it makes its optimiser. The gradient of the penalty, of methods that have
    one, is added before each optimiser step, after clipping. Checkpoints hold the state (as the tensor "kronblocks_state" among
    the weights), so that `trainer.train(resume_from_checkpoint=...)` goes on to the same bits. Logs get "block_sparsity", counted
    from the weights; loggers see it if they come after this callback: `report_to="none", callbacks=[SparsityCallback(...),
    TensorBoardCallback()]`. After the training `kronblocks.save_pretrained(trainer.model, folder)` saves the model.

    Args:
        config: what `sparsify_` gets, or a `Sparsifier` that it made for the same model: the Trainer may then be given
            `optimizers=`, made from `kronblocks.parameter_groups`.

    Attributes:
        sparsifier: once the Trainer has been made.
    """

    def __init__(self, config: SparsityConfig | Sparsifier | None = None) -> None:
        self.sparsifier = config if isinstance(config, Sparsifier) else None
        self.config = config if isinstance(config, SparsityConfig) else SparsityConfig()
        self._attachment: Any = None
        self._carried: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Replace the layers."""
        if self.sparsifier is None:
            if kwargs.get("optimizer") is not None:
                raise KronblocksError(
                    "the optimiser given to the Trainer holds the dense weights, which are replaced now: make the sparsifier "
                    "first, sparsifier = kronblocks.sparsify_(model, config), then the optimiser, and give "
                    "SparsityCallback(sparsifier)"
                )
            self.sparsifier = sparsify_(model, self.config)
        elif self.sparsifier.model is not model:
            raise KronblocksError("the sparsifier is of another model than the Trainer's: give sparsify_ the Trainer's model")
        self._carried = self.sparsifier.save_with_model()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **kwargs: Any
    ) -> None:
        """Follow the optimiser."""
        sparsifier = self._ready()
        if sparsifier.model is not model:
            raise KronblocksError(
                "the Trainer has made another model since SparsityCallback replaced layers: give it model=, not model_init="
            )
        self._let_go()
        if (sparsifier.step == 0) != (state.global_step == 0):
            what = (
                "make a new model and Trainer for a new training" if sparsifier.step else "the checkpoint has none of its states"
            )
            raise KronblocksError(
                f"the Trainer begins at step {state.global_step}, but the sparsifier is at step {sparsifier.step}: {what}"
            )
        self._carried.remove()
        self._carried = sparsifier.save_with_model()
        self._attachment = sparsifier.attach(kwargs["optimizer"], total_steps=state.max_steps, add_penalty=True)

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
