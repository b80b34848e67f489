"""Loops of frameworks: Lightning, transformers' Trainer, Accelerate."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from tests.helpers import STEPS, check_layers_agree
from tests.in_the_field.cases import works
from tests.in_the_field.trial import SPARSITY, Trial, config, loss_of, mlp, same_output
from torch import Tensor

import kronblocks
from kronblocks import BlockSparseLinear, SparsityConfig, parameter_groups

LOOPS, LOADERS = "loops", "loaders"


@functools.cache
def lightning() -> Any:
    """The module, and a LightningModule of ours: imported when a case asks for it."""
    import lightning.pytorch as pl

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, rows: Tensor, _: int) -> Tensor:
            return loss_of(self.net, len(rows))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(parameter_groups(self, lr=1e-2))

    return pl, Lit


def fit(folder: Path, module: Any, callback: Any, *, resume: Path | None = None, steps: int = STEPS, **settings: Any) -> Any:
    pl, _ = lightning()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    limits = {} if {"fast_dev_run", "max_epochs"} & settings.keys() else {"max_steps": steps, "max_epochs": -1}
    trainer = pl.Trainer(callbacks=callback, accelerator="cpu", default_root_dir=folder, **limits, **quiet, **settings)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(32 * 10), batch_size=32), ckpt_path=resume)
    return trainer


def callback_() -> Any:
    from kronblocks.integrations.lightning import SparsityCallback

    return SparsityCallback(config())


def check_lit(module: Any) -> None:
    layers = [layer for layer in module.modules() if isinstance(layer, BlockSparseLinear)]
    assert len(layers) == 2
    assert sum(int((~layer.block_mask).sum()) for layer in layers) == SPARSITY * sum(layer.grid.blocks for layer in layers)
    check_layers_agree(module)


@works(LOOPS, "Lightning: fit", "`SparsityCallback(config)`", "lightning")
def lightning_fit(folder: Path) -> None:
    module = lightning()[1]()
    callback = callback_()
    fit(folder, module, callback)
    assert callback.sparsifier.sparsity == SPARSITY
    check_lit(module)


@works(LOOPS, "Lightning: fast_dev_run, max_steps=1", "one step without pruning; a warning says so", "lightning")
def lightning_smoke(folder: Path) -> None:
    import warnings

    for settings in ({"fast_dev_run": True}, {"steps": 1}):
        module = lightning()[1]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(folder, module, callback_(), **settings)
        check_layers_agree(module)


@works(LOOPS, "Lightning: `fit(ckpt_path=...)`", "goes on to the same bits, over the lift too", "lightning")
def lightning_resume(folder: Path) -> None:
    pl, Lit = lightning()

    class Saver(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step in (10, 20):
                trainer.save_checkpoint(folder / f"{trainer.global_step}.ckpt")

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}
    data = torch.utils.data.DataLoader(torch.randn(320, 32), batch_size=32)
    both = {"accelerator": "cpu", "max_steps": STEPS, "max_epochs": -1, **quiet}

    class Fixed(Lit):
        def training_step(self, x: Tensor, _: int) -> Tensor:
            return (self.net(x) - x[:, :16]).square().mean()

    torch.manual_seed(3)
    whole = Fixed()
    pl.Trainer(callbacks=[callback_(), Saver()], **both).fit(whole, data)
    for step in (10, 20):
        again = Fixed()
        pl.Trainer(callbacks=[callback_()], **both).fit(again, data, ckpt_path=folder / f"{step}.ckpt", weights_only=False)
        for (name, one), other in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), (step, name)


@works(
    LOADERS,
    "Lightning: `load_from_checkpoint`, a Trainer without the callback",
    "`rebuild_on_load_(self)` at the end of `__init__`",
    "lightning",
)
def lightning_load(folder: Path) -> None:
    pl, Lit = lightning()

    class Rebuilt(Lit):
        def __init__(self) -> None:
            super().__init__()
            kronblocks.rebuild_on_load_(self)

        def predict_step(self, x: Tensor, _: int) -> Tensor:
            return self.net(x)

    module = Rebuilt()
    path = folder / "last.ckpt"
    fit(folder, module, callback_()).save_checkpoint(path)
    again = Rebuilt.load_from_checkpoint(path, weights_only=True)
    check_lit(again)
    assert same_output(again, module)
    x, other = torch.randn(8, 32), Rebuilt()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    (found,) = pl.Trainer(default_root_dir=folder, **quiet).predict(
        other, torch.utils.data.DataLoader(x, batch_size=8), ckpt_path=path, weights_only=True
    )
    assert torch.allclose(found, module.eval()(x), atol=1e-5)


@works(LOOPS, "Lightning: k-fold with one callback", "the same list of callbacks for each new model", "lightning")
def lightning_folds(folder: Path) -> None:
    callback = callback_()
    for _ in range(2):
        module = lightning()[1]()
        fit(folder, module, callback)
        assert callback.sparsifier.sparsity == SPARSITY
        check_lit(module)


def bert() -> Any:
    import transformers as tf

    tf.logging.set_verbosity_error()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))


def trainer(folder: Path, steps: int = STEPS, *, model_init: Any = None, **more: Any) -> Any:
    import transformers as tf

    from kronblocks.integrations.transformers import SparsityCallback

    data = [{"input_ids": torch.arange(4) + i % 20, "labels": torch.tensor(i % 2)} for i in range(64)]
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to="none", use_cpu=True, save_steps=20, disable_tqdm=True,
        logging_steps=1000, learning_rate=1e-2, seed=1,
    )  # fmt: skip
    callback = SparsityCallback(bert_config())
    if model_init is None:
        more["model"] = bert()
    else:
        more["model_init"] = callback.model_init(model_init)
    return tf.Trainer(args=arguments, train_dataset=data, callbacks=[callback], **more), callback


def bert_config() -> SparsityConfig:
    return SparsityConfig(block_size=4, target_sparsity=SPARSITY, exclude=("classifier",), measure_plans=False)


def check_bert(model: Any) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, BlockSparseLinear)]
    assert len(layers) == 7
    assert sum(int((~layer.block_mask).sum()) for layer in layers) == SPARSITY * sum(layer.grid.blocks for layer in layers)
    check_layers_agree(model)


@works(
    "averages",
    "Lightning: EMAWeightAveraging, StochasticWeightAveraging",
    "listed after `SparsityCallback`; begin again with the layers and in `heal`",
    "lightning",
)
def lightning_averages(folder: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging

    for average in (EMAWeightAveraging(decay=0.5), StochasticWeightAveraging(1e-2, swa_epoch_start=2)):
        module = lightning()[1]()
        fit(folder, module, [callback_(), average], max_epochs=STEPS // 10)
        check_lit(module)


@works(LOOPS, "transformers: Trainer", "`SparsityCallback(config)`", "transformers", "accelerate")
def trainer_fit(folder: Path) -> None:
    made, _ = trainer(folder)
    made.train()
    check_bert(made.model)


@works(
    LOOPS,
    "transformers: `Trainer(model_init=...)`, hyperparameter_search",
    "`model_init=callback.model_init(make_model)`",
    "transformers",
    "accelerate",
)
def trainer_init(folder: Path) -> None:
    made, _ = trainer(folder, model_init=bert)
    for _ in range(2):
        made.train()
        check_bert(made.model)


@works(LOOPS, "transformers: `resume_from_checkpoint=True`", "goes on to the same bits", "transformers", "accelerate")
def trainer_resume(folder: Path) -> None:
    torch.manual_seed(0)
    whole, _ = trainer(folder / "whole")
    whole.train()
    torch.manual_seed(0)
    again, _ = trainer(folder / "again")
    again.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-20"))
    check_bert(again.model)
    for (name, one), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@works(
    LOOPS, "transformers: resuming with more steps", "the mask stays; the steps that are added heal", "transformers", "accelerate"
)
def trainer_more(folder: Path) -> None:
    first, _ = trainer(folder)
    first.train()
    masks = [layer.block_mask for layer in first.model.modules() if isinstance(layer, BlockSparseLinear)]
    more, callback = trainer(folder, STEPS + 10)
    more.train(resume_from_checkpoint=True)
    assert callback.sparsifier.step == STEPS + 10
    check_bert(more.model)
    after = [layer.block_mask for layer in more.model.modules() if isinstance(layer, BlockSparseLinear)]
    assert all(torch.equal(one, other) for one, other in zip(masks, after, strict=True))


@works(
    LOADERS,
    "transformers: `save_pretrained`, `AutoModel.from_pretrained`",
    "`import kronblocks` first, where the model is loaded",
    "transformers",
    "accelerate",
)
def automodel(folder: Path) -> None:
    import transformers as tf

    made, _ = trainer(folder)
    made.train()
    model = made.model.eval()
    kronblocks.save_pretrained(model, folder / "ours")
    again = kronblocks.from_pretrained(folder / "ours")
    tokens = torch.arange(4).unsqueeze(0)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    model.save_pretrained(folder / "theirs")
    other, found = tf.AutoModelForSequenceClassification.from_pretrained(folder / "theirs", output_loading_info=True)
    assert not found["missing_keys"] and torch.equal(other(tokens).logits, model(tokens).logits)
    check_bert(other)


@works(LOOPS, "Accelerate", "`attach` finds the optimiser that `prepare` wraps", "accelerate")
def accelerate(folder: Path) -> None:
    from accelerate import Accelerator

    trial = Trial()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(trial.model, torch.optim.AdamW(parameter_groups(trial.model, lr=1e-2)))
    trial.attach(optimizer)
    while trial.sparsifier.step < STEPS:
        with accelerator.accumulate(model):
            loss = loss_of(model)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            trial.note(loss)
    trial.check()


@works(LOADERS, "Accelerate: `save_state`, `load_state`", "after `sparsifier.save_with_model()`", "accelerate")
def accelerate_states(folder: Path) -> None:
    from accelerate import Accelerator

    def prepared() -> Any:
        trial = Trial()
        trial.sparsifier.save_with_model()
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(trial.model, torch.optim.AdamW(parameter_groups(trial.model, lr=1e-2)))
        trial.attach(optimizer)
        return trial, accelerator, model, optimizer

    trial, accelerator, model, optimizer = prepared()
    for _ in range(20):
        trial.step(optimizer, model=model)
    accelerator.save_state(str(folder / "state"), safe_serialization=False)
    again, accelerator, model, optimizer = prepared()
    accelerator.load_state(str(folder / "state"))
    assert again.sparsifier.step == 20 and same_output(again.model, trial.model)
    again.train(optimizer, model=model, falls=False)
