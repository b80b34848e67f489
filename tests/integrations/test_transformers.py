"""The Trainer's callback sparsifies, follows, adds the penalty, logs what is counted, and resumes to the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

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
from kronblocks.errors import KronblocksWarning
from kronblocks.integrations.transformers import DistillingTrainer, SparsityCallback
from kronblocks.sparsity.report import count_blocks

STEPS = 24


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes))


def examples(count: int = 64) -> list[dict]:
    tokens = torch.randint(1, 40, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in tokens]


def config(**settings) -> SparsityConfig:
    shared = {"block_size": 4, "rank": 2, "target_sparsity": 0.75, "measure_plans": False, "exclude": ("classifier",)}
    return SparsityConfig(**{**shared, **settings})


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


@pytest.mark.parametrize("stop", [4, 20])  # before the lift and after it
@pytest.mark.parametrize("method", ["two-phase", "rigl", "group-lasso"])
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
    with pytest.raises(KronblocksError, match="not model_init="):
        Trainer(model_init=bert, args=arguments(tmp_path), train_dataset=data, callbacks=[SparsityCallback(config())]).train()
    with pytest.raises(KronblocksError, match="another model"):
        Trainer(bert(), arguments(tmp_path), callbacks=[SparsityCallback(sparsify_(bert(), config()))])
    late = Trainer(bert(), arguments(tmp_path), train_dataset=data)
    late.add_callback(SparsityCallback(config()))
    with pytest.raises(KronblocksError, match=r"callbacks=\[\.\.\.\]"):
        late.train()
    trainer = trained(tmp_path, SparsityCallback(config()))
    with pytest.raises(KronblocksError, match="make a new model"):
        trainer.train()
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
