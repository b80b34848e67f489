"""The Trainer's callback sparsifies, follows, adds the penalty, logs what is counted, and resumes to the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests import helpers
from torch import nn

pytest.importorskip("accelerate")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils
from transformers.trainer import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_utils import HPSearchBackend

from kronblocks import (
    BlockSparseLinear,
    Distillation,
    KronblocksError,
    KroneckerBlockLinear,
    PenaltyConfig,
    SparsityConfig,
    from_pretrained,
    parameter_groups,
    save_pretrained,
    sparsify_,
)
from kronblocks.algorithms.training.report import count_blocks
from kronblocks.core.errors import KronblocksWarning
from kronblocks.integrations.transformers import DistillingTrainer, SparsityCallback

pytestmark = pytest.mark.slow

STEPS = 24


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes))


def examples(count: int = 64) -> list[dict]:
    tokens = torch.randint(1, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in tokens]


def config(**settings: Any) -> SparsityConfig:
    return helpers.config(**{"block_size": 4, "rank": 2, "exclude": ("classifier",), **settings})


def arguments(folder, **settings) -> TrainingArguments:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 8}
    training = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "seed": 3}
    return TrainingArguments(output_dir=str(folder), **{**quiet, **training, **settings})


def trained(folder, callback, model=None, resume=None, **settings) -> Trainer:
    trainer = Trainer(model or bert(), arguments(folder, **settings), train_dataset=examples(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_it_trains_to_the_target_logs_what_is_counted_and_the_model_is_saved(tmp_path):
    callback = SparsityCallback(config())
    trainer = trained(tmp_path, callback)
    layer = trainer.model.bert.encoder.layer[0].intermediate.dense
    assert isinstance(layer, BlockSparseLinear) and isinstance(trainer.model.classifier, nn.Linear)
    counted = count_blocks(callback.sparsifier.targets).block_sparsity
    assert counted == pytest.approx(0.75, abs=0.01) and callback.sparsifier.step == STEPS
    logged = [entry["block_sparsity"] for entry in trainer.state.log_history]
    assert logged[-1] == pytest.approx(counted) and logged == sorted(logged)
    assert "kronblocks_state" not in trainer.model.state_dict()
    save_pretrained(trainer.model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved").eval()
    inputs = {name: torch.stack([example[name] for example in examples(4)]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, trainer.model.eval()(**inputs).logits)


# before the lift and after it
@pytest.mark.parametrize(("method", "stop"), [("two-phase", 4), ("two-phase", 20), ("rigl", 4), ("group-lasso", 20)])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path, method, stop):
    own = config(method=method, rank=2 if method == "two-phase" else None)
    whole = trained(tmp_path / "whole", SparsityCallback(own), save_strategy="steps", save_steps=stop)
    callback = SparsityCallback(own)
    resumed = trained(tmp_path / "resumed", callback, resume=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    assert callback.sparsifier.step == STEPS


@pytest.mark.parametrize(
    "settings", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"max_grad_norm": 0.1}, {"optim": "sgd"}]
)
def test_ways_of_training(tmp_path, settings):
    callback = SparsityCallback(config())
    trainer = trained(tmp_path, callback, **settings)
    assert callback.sparsifier.step == STEPS and callback.sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_the_penalty_acts_and_is_the_gradient_of_the_penalty_in_the_loss(tmp_path):
    own = config(method="group-lasso", rank=None, penalty=PenaltyConfig(form="gradient", strength=0.05))
    plain = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 4}
    trainer = trained(tmp_path, SparsityCallback(own), **plain)

    class InTheLoss(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + self.callback_handler.callbacks[-2].sparsifier.penalty() if model.training else loss

    class Silent(SparsityCallback):
        def on_train_begin(self, args, state, control, *, optimizer=None, **kwargs):
            self._attachment = self.sparsifier.attach(optimizer, total_steps=state.max_steps)

    other = InTheLoss(bert(), arguments(tmp_path, **plain), train_dataset=examples(), callbacks=[Silent(own)])
    other.train()
    for (name, found), expected in zip(trainer.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name


def test_an_own_optimiser_comes_after_sparsify(tmp_path):
    model = bert()
    sparsifier = sparsify_(model, config())
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=examples(),
        callbacks=[SparsityCallback(sparsifier)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
    lifted = next(group for group in optimizer.param_groups if group["name"] == "lifted")
    assert lifted["params"] and {id(p) for p in lifted["params"]} <= {id(p) for p in model.parameters()}


def test_the_best_checkpoint_gets_its_layers_back_and_too_few_zeros_are_said(tmp_path):
    scores = iter(range(9, 0, -1))  # the first evaluation is the best
    keep = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 6}
    callback = SparsityCallback(config())
    data = {
        "train_dataset": examples(),
        "eval_dataset": examples(16),
        "compute_metrics": lambda prediction: {"score": next(scores)},
    }
    trainer = Trainer(bert(), arguments(tmp_path, **keep, **best), callbacks=[callback], **data)
    with pytest.warns(KronblocksWarning, match=r"not 75%: the best checkpoint, .*checkpoint-4, was loaded; pruning ends at step"):
        trainer.train()
    assert isinstance(trainer.model.bert.encoder.layer[0].intermediate.dense, KroneckerBlockLinear)
    assert callback.sparsifier.step == 4


def test_what_cannot_be_is_said(tmp_path):
    model, data = bert(), examples()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(KronblocksError, match="holds the dense weights"):
        Trainer(model, arguments(tmp_path), callbacks=[SparsityCallback(config())], optimizers=(optimizer, None))
    with pytest.raises(KronblocksError, match=r"model_init=callback\.model_init\(make_model\)"):
        Trainer(model_init=bert, args=arguments(tmp_path), train_dataset=data, callbacks=[SparsityCallback(config())]).train()
    with pytest.raises(KronblocksError, match="another model"):
        Trainer(bert(), arguments(tmp_path), callbacks=[SparsityCallback(sparsify_(bert(), config()))])
    late = Trainer(bert(), arguments(tmp_path), train_dataset=data)
    late.add_callback(SparsityCallback(config()))
    with pytest.raises(KronblocksError, match=r"callbacks=\[\.\.\.\]"):
        late.train()
    with pytest.raises(KronblocksError, match="has one model, but model_init makes several"):
        SparsityCallback(sparsify_(bert(), config())).model_init(bert)
    with pytest.raises(KronblocksError, match="needs a SparsityConfig, not dict"):
        Trainer(bert(), arguments(tmp_path), callbacks=[SparsityCallback({"block_size": 4})])
    Trainer(bert(), arguments(tmp_path, save_strategy="steps", save_steps=STEPS), train_dataset=data).train()
    with pytest.raises(KronblocksError, match="load weights of a dense model before sparsify_"):
        trained(tmp_path, SparsityCallback(config()), resume=str(tmp_path / f"checkpoint-{STEPS}"))


def test_a_state_dict_carries_the_state(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    sparsifier = sparsify_(model, config(exclude=()))
    carried = sparsifier.save_with_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer, total_steps=20)
    before = copy.deepcopy(model.state_dict())
    for _ in range(12):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    fresh = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    other = sparsify_(fresh, config(exclude=()))
    other.save_with_model()
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.step == 12 and torch.equal(fresh[0].weight, model[0].weight)
    fresh.load_state_dict(before)  # and back, over the lift
    assert other.step == 0 and isinstance(fresh[0], KroneckerBlockLinear)
    with pytest.raises(KronblocksError, match="holds no state of a Sparsifier"):
        fresh.load_state_dict({**before, "kronblocks_state": torch.zeros(8, dtype=torch.uint8)})
    carried.remove()
    assert "kronblocks_state" not in model.state_dict()


def test_a_trainer_that_learns_from_the_trained_model(tmp_path):
    teacher = bert()
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)  # sure of its answers
    batch = {name: torch.stack([example[name] for example in examples()]) for name in ("input_ids", "attention_mask")}
    distances = []
    for weight in (0.0, 1.0):
        model = copy.deepcopy(teacher)
        callback = SparsityCallback(config(method="rigl", init="nearest", rank=None))
        distillation = Distillation.of(teacher, weight=weight)
        trainer = DistillingTrainer(
            model, arguments(tmp_path), train_dataset=examples(), callbacks=[callback], distillation=distillation
        )
        trainer.train()
        assert count_blocks(callback.sparsifier.targets).block_sparsity >= 0.75
        with torch.no_grad():
            whole = Distillation.of(teacher, weight=1)(torch.zeros(()), model.eval()(**batch), **batch)
        distances.append(float(whole))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_distilling_over_several_batches_is_distilling_over_one(tmp_path, weight):
    teacher = bert()
    with torch.no_grad():
        teacher.classifier.weight.mul_(50)
    found = []
    for batch, several in ((32, 1), (8, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": several, "max_steps": 1}
        settings = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
        model = bert().eval()
        for module in model.modules():  # no dropout, so that batches can be compared
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        distillation = Distillation(teacher, weight=weight)
        trainer = DistillingTrainer(
            model, arguments(tmp_path, **sizes, **settings), train_dataset=examples(32), distillation=distillation
        )
        trainer.train()
        found.append(model.classifier.weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


class Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_train_called_again_goes_on_with_the_mask_frozen_and_not_before(tmp_path):
    callback = SparsityCallback(config())
    trainer = trained(tmp_path, callback)
    mask = callback.sparsifier.targets[0].mask.clone()
    trainer.train()
    assert callback.sparsifier.step == 2 * STEPS and torch.equal(callback.sparsifier.targets[0].mask, mask)
    early = Trainer(
        bert(), arguments(tmp_path), train_dataset=examples(), callbacks=[SparsityCallback(config()), Stop(STEPS // 4)]
    )
    with pytest.warns(KronblocksWarning, match="it ended early"):
        early.train()
    with pytest.raises(KronblocksError, match="make a new model"):
        early.train()


def test_more_steps_are_the_trainers_words_and_allowed_once_the_mask_is_frozen(tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 4}
    whole = trained(tmp_path, SparsityCallback(config()), **keep)
    with pytest.raises(
        KronblocksError, match=r"step 4 of 24, .* write max_steps=24 in TrainingArguments, or the num_train_epochs"
    ):
        trained(tmp_path / "other", SparsityCallback(config()), resume=str(tmp_path / "checkpoint-4"), max_steps=32)
    callback = SparsityCallback(config())
    longer = trained(tmp_path / "other", callback, resume=str(tmp_path / f"checkpoint-{STEPS}"), max_steps=32, **keep)
    assert callback.sparsifier.step == 32 and callback.sparsifier.phase == "heal"
    assert [layer.live_blocks for layer in callback.sparsifier.report().layers] == [
        int(module.block_mask.sum()) for module in whole.model.modules() if isinstance(module, BlockSparseLinear)
    ]
    again = trained(
        tmp_path / "again", SparsityCallback(config()), resume=str(tmp_path / "other" / "checkpoint-32"), max_steps=36
    )
    assert again.state.global_step == 36 and not torch.equal(again.model.classifier.weight, longer.model.classifier.weight)


def test_a_trial_of_one_step(tmp_path):
    with pytest.warns(KronblocksWarning, match="1 step is too few to prune .* nothing is pruned in this run") as found:
        trainer = trained(tmp_path, SparsityCallback(config()), max_steps=1)
    assert len([each for each in found if issubclass(each.category, KronblocksWarning)]) == 1 and trainer.state.global_step == 1


def test_a_trainer_that_makes_its_own_models(tmp_path):
    callback = SparsityCallback(config())
    keep = {"save_strategy": "steps", "save_steps": 4}
    trainer = Trainer(
        model_init=callback.model_init(bert), args=arguments(tmp_path, **keep), train_dataset=examples(), callbacks=[callback]
    )
    assert "eval_loss" in trainer.evaluate(examples(8)) and callback.sparsifier.sparsity == 0
    states = []
    for _ in range(2):
        trainer.train()
        assert callback.sparsifier.model is trainer.model and callback.sparsifier.step == STEPS
        assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]), "the same seed"
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))  # over the lift, into a new model
    assert callback.sparsifier.step == STEPS and all(torch.equal(states[0][n], t) for n, t in trainer.model.state_dict().items())


class Trial(dict):
    def __init__(self, number: int) -> None:
        super().__init__(learning_rate=1e-3 * (number + 1))
        self.number, self.params = number, dict(self)


class Trials:
    """Stands in for optuna, and does with the Trainer what transformers does for it."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int]] = []

    def ensure_available(self) -> None: ...

    def run(self, trainer, n_trials, direction, **kwargs):
        for number in range(n_trials):
            trainer.objective = None
            trainer.train(resume_from_checkpoint=None, trial=Trial(number))
            trainer.objective = trainer.compute_objective(trainer.evaluate())
            self.found.append((trainer.args.learning_rate, sparse_layers(trainer.model)))
            trainer.model_wrapped = trainer.model = None
        return self.found


def sparse_layers(model: nn.Module) -> int:
    return sum(isinstance(module, BlockSparseLinear) for module in model.modules())


def test_a_hyperparameter_search_makes_each_trials_model_sparse(tmp_path, monkeypatch):
    backend = Trials()
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, lambda: backend)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: True)  # a trial is a dict then

    def sparsity(trial) -> SparsityConfig:
        return config(target_sparsity=0.5 if trial is None else 0.25 * (trial.number + 2))

    callback = SparsityCallback(sparsity)
    trainer = Trainer(
        model_init=callback.model_init(lambda trial: bert()),
        args=arguments(tmp_path),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=[callback],
    )
    trainer.hyperparameter_search(
        hp_space=lambda trial: trial, backend="optuna", n_trials=2, compute_objective=lambda metrics: metrics["eval_loss"]
    )
    assert backend.found == [(1e-3, 13), (2e-3, 13)]
    assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=0.01)


def test_one_callback_for_the_trainers_of_a_cross_validation(tmp_path):
    callback = SparsityCallback(config())
    for _ in range(2):
        trainer = trained(tmp_path, callback)
        assert callback.sparsifier.model is trainer.model and callback.sparsifier.step == STEPS
        assert callback.sparsifier.sparsity == pytest.approx(0.75, abs=0.01)
    first, second = (Trainer(bert(), arguments(tmp_path), train_dataset=examples(), callbacks=[callback]) for _ in range(2))
    with pytest.raises(KronblocksError, match="a callback each"):
        first.train()
    second.train()
