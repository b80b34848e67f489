"""Trainings of the decoder: what it learns, every method, resuming, refusals, and what becomes of the model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tests.lab.test_train import Interrupt, lasting

from kronblocks import KronblocksError, ScheduleConfig
from kronblocks.config.methods import METHODS
from kronblocks_lab.__main__ import main
from kronblocks_lab.training import language
from kronblocks_lab.training import train as training
from kronblocks_lab.training.decoder import Decoder, DecoderSize, written
from kronblocks_lab.training.module import learning_rate_factor
from kronblocks_lab.training.settings import CompareConfig, TrainConfig
from kronblocks_lab.training.tasks import task_of
from kronblocks_lab.training.trained import trained_model

PATTERN = "the quick brown fox jumps over the lazy dog. "


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "pattern.txt"
    file.write_text(PATTERN * 60)
    return file


@pytest.fixture(autouse=True)
def _short_samples(monkeypatch):
    monkeypatch.setattr(language, "WRITTEN", 20)


def config(out: Path, file: Path | None, **settings) -> TrainConfig:
    small = {"width": 32, "depth": 1, "heads": 2, "context": 16, "steps": 24, "epochs": 2, "batch_size": 8, "block_size": "8"}
    schedule = ScheduleConfig(update_every=2)
    fixed = {"data": "text", "model": "decoder", "data_file": file, "progress": False, "threads": 1, "measure_plans": False}
    return TrainConfig(**{"out": out, **fixed, **small, "schedule": schedule, **settings})


@pytest.mark.slow
def test_a_repeated_pattern_is_learnt_far_below_what_letters_alone_give(tmp_path, pattern):
    result = training.train(config(tmp_path / "run", pattern, steps=160, lr=2e-2, sparsity=0.5, seed=1))
    shares = [PATTERN.count(letter) / len(PATTERN) for letter in set(PATTERN)]
    letters = -sum(share * math.log(share) for share in shares)
    assert result["test_loss"] < 0.3 * letters and result["test_accuracy"] > 0.9
    assert result["block_sparsity"] >= 0.5
    assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    assert result["test_bits_per_character"] == pytest.approx(result["test_loss"] / math.log(2))
    assert result["source"]["title"] == "pattern.txt" and result["source"]["bytes"] == 60 * len(PATTERN)
    assert [each["step"] for each in result["history"]] == [80, 160]
    for sample in result["samples"]["texts"]:
        assert sample["prompt"] in PATTERN * 3 and len(sample["text"]) == 20
    _, shape, vocabulary = trained_model(tmp_path / "run")
    assert shape == (16,) and set(vocabulary) >= set(PATTERN)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "two-phase"])
def test_every_method_trains_a_decoder(tmp_path, pattern, method):
    result = training.train(config(tmp_path / "run", pattern, method=method, epochs=1))
    target = 0.0 if method == "dense" else 0.9
    assert target <= result["block_sparsity"] < target + 0.02 and math.isfinite(result["test_loss"])
    assert "model.lm_head" in [each["name"] for each in result["surgery"]["left_dense"]] or method == "dense"


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, pattern, monkeypatch):
    whole = training.train(config(tmp_path / "whole", pattern, steps=30, epochs=3))

    class Dies(training.LanguageModelling):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 5:
                raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "LanguageModelling", Dies)
        with pytest.raises(Interrupt):
            training.train(config(tmp_path / "parts", pattern, steps=30, epochs=3))
    torch.manual_seed(12345)
    resumed = training.train(config(tmp_path / "parts", pattern, steps=30, epochs=3, resume=True))
    assert lasting(resumed) == lasting(whole)
    other = tmp_path / "other.txt"
    other.write_text(PATTERN * 61)
    with pytest.raises(KronblocksError, match=r"other settings \(text\)"):
        training.train(config(tmp_path / "parts", other, steps=30, epochs=3, resume=True))


@pytest.mark.slow
def test_the_test_part_decides_nothing(tmp_path):
    """Two texts that differ in their test part alone give the same model and the same validation."""
    draw = random.Random(0)
    text = "".join(draw.choices("abcd ", k=1000))
    results = []
    for number, end in enumerate(("a" * 50, "dcba " * 10)):
        file = tmp_path / f"{number}.txt"
        file.write_text(text[:-50] + end)
        results.append(training.train(config(tmp_path / f"run{number}", file, steps=10, context=8)))
    assert results[0]["validation_loss"] == results[1]["validation_loss"] and results[0]["test_loss"] != results[1]["test_loss"]
    weights = [(tmp_path / f"run{number}" / "model").glob("*.safetensors") for number in range(2)]
    assert next(weights[0]).read_bytes() == next(weights[1]).read_bytes()


@pytest.mark.slow
def test_bf16_trains_and_keeps_weights_in_fp32(tmp_path, pattern):
    plain, short = (
        training.train(config(tmp_path / precision, pattern, precision=precision, method="static", sparsity=0.5))
        for precision in ("fp32", "bf16")
    )
    assert plain["test_loss"] != short["test_loss"] == pytest.approx(plain["test_loss"], abs=0.05)
    assert {p.dtype for p in trained_model(tmp_path / "bf16").model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_search_on_the_command_line(pattern, capsys):
    small = "--width 16 --depth 1 --context 8 --steps 40 --epochs 2 --batch-size 4 --threads 1 --sparsity 0.5"
    main([*f"search --model decoder --data text {small} --sizes 4 8".split(), "--data-file", str(pattern)])
    assert "found: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_trained_decoder_starts_another_training_and_teaches_it(tmp_path, pattern):
    training.train(config(tmp_path / "dense", pattern, method="dense", steps=80, lr=1e-2))
    shared = {"method": "magnitude", "sparsity": 0.5, "lr": 1e-2, "steps": 40}
    alone = training.train(config(tmp_path / "alone", pattern, **shared))
    taught = training.train(config(tmp_path / "taught", pattern, start_from=tmp_path / "dense", distill=0.5, **shared))
    assert taught["validation_loss"] < 0.5 * alone["validation_loss"]
    other = tmp_path / "other.txt"
    other.write_text(pattern.read_text().replace("q", "Q"))
    with pytest.raises(KronblocksError, match="knows other characters than other.txt"):
        training.train(config(tmp_path / "other", other, start_from=tmp_path / "dense", **shared))


@pytest.mark.slow
def test_a_decoder_is_exported_and_inspected(tmp_path, pattern, capsys):
    result = training.train(config(tmp_path / "run", pattern, steps=60))
    files = ["--evaluate", "--data-file", str(pattern), "--out", str(tmp_path / "out")]
    main(["export", str(tmp_path / "run"), "--form", "packed", "--rows", "32", *files])
    scores = json.loads((tmp_path / "out/manifest.json").read_text())["scores"]
    assert scores["model"] == pytest.approx(result["validation_loss"], abs=1e-4) == pytest.approx(scores["exported"], abs=1e-3)
    main(["inspect", str(tmp_path / "run")])
    assert "test loss: " in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text(PATTERN * 61)
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "run"), "--evaluate", "--data-file", str(other), "--out", str(tmp_path / "again")])
    assert "was trained on another text than other.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"heads": 3}, "--heads 3 must divide --width 32 into even parts.*--heads 2"),
        ({"width": 33}, "--width 33 must be even"),
        ({"depth": 0}, "--depth must be at least 1"),
        ({"widths": (8,)}, "--widths are the hidden layers of --model mlp: decoder has none"),
        ({"image_size": 32}, "--image-size is for --model vit-tiny.*, not decoder"),
        ({"train_images": 5}, "--train-images is for images"),
        ({"fold": 1}, "--fold is for images"),
        ({"flip": False}, "--flip is for images"),
        ({"data_label": "mine"}, "--data-label is for images"),
        ({"drop_path": 0.1}, "--drop-path is for --model vit, vit-tiny, vit-base, not decoder"),
        ({"data": "digits"}, "--model decoder cannot learn --data digits: add --data text"),
        ({"model": "mlp", "data": "text"}, "--model mlp cannot learn --data text: add --model decoder"),
        ({"model": "mlp", "data": "digits"}, "--width is for --model decoder, vit, not mlp"),
        ({"steps": 25, "epochs": 2}, "--steps 25 is no multiple of --epochs 2.*write --steps 24"),
        ({"clip": 0.0}, "--clip 0 would leave no gradient"),
        ({"warm_up": 1.0}, "--warm-up is a share of the steps"),
        ({"beta2": 1.0}, "--beta2 is a number from 0 to below 1"),
        ({"final_lr": 2.0}, "--final-lr is a share"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, pattern, settings, says):
    with pytest.raises(KronblocksError, match=says):
        config(tmp_path / "run", pattern, **settings)
    assert not (tmp_path / "run").exists()


def test_texts_that_do_not_fit_leave_no_folder(tmp_path, pattern):
    with pytest.raises(KronblocksError, match=r"pattern\.txt has 2,700 characters.*at least 20,020 characters"):
        training.train(config(tmp_path / "run", pattern, context=1000))
    with pytest.raises(KronblocksError, match="cannot read"):
        training.train(config(tmp_path / "run", tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_model_has_the_decays_of_its_kind(tmp_path, pattern):
    recipe = config(tmp_path, pattern).recipe
    assert (recipe.lr, recipe.weight_decay, recipe.lifted_weight_decay, recipe.factor_weight_decay) == (2e-3, 0.1, None, 0.0)
    assert config(tmp_path, pattern, clip=2.0).course == (0.99, 2.0, 0.1, 0.1)
    assert TrainConfig(out=tmp_path).course == (0.999, None, 0.1, 0.0)
    compared = CompareConfig(out=tmp_path, data="text", model="decoder", data_file=pattern, methods=("dense", "static"))
    assert [run.samples for run in compared.runs()] == [16, 16]


def test_a_decoder_sees_no_later_character():
    torch.manual_seed(0)
    model = Decoder(11, DecoderSize(16, 2, 2, 8)).eval()
    x = torch.randint(11, (3, 8))
    changed = x.clone()
    changed[:, 5] = (x[:, 5] + 1) % 11
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_layers_that_write_into_the_stream_begin_smaller():
    torch.manual_seed(0)
    model = Decoder(50, DecoderSize(128, 8, 4, 16))
    deviations = {name: float(weight.detach().std()) for name, weight in model.named_parameters() if weight.dim() == 2}
    for name, deviation in deviations.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert deviation == pytest.approx(0.02 / (4 if writes else 1), rel=0.05), name
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


class Counts(torch.nn.Module):
    """The next number, modulo 5, with certainty."""

    def forward(self, x):
        return 50.0 * torch.nn.functional.one_hot((x + 1) % 5, 5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_writes_what_it_expects(temperature):
    text = written(Counts(), torch.tensor([[0, 1], [3, 4]]), 7, 4, temperature, seed=0)
    assert text.tolist() == [[2, 3, 4, 0, 1, 2, 3], [0, 1, 2, 3, 4, 0, 1]]


def test_gradients_are_clipped_together(tmp_path, pattern):
    settings = config(tmp_path, pattern, clip=1e-3)
    module = language.LanguageModelling(settings, task_of(settings))
    inputs, labels = next(iter(module.task.train_batches(0)))
    module.training_loss(inputs, labels).backward()
    before = [p.grad.clone() for p in module.parameters()]
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in before))
    assert norm > 1e-2
    for grad, p in zip(before, module.parameters(), strict=True):
        torch.testing.assert_close(p.grad, grad * 1e-3 / norm, rtol=1e-3, atol=0)


def test_the_rate_rises_falls_and_ends_where_it_should():
    factors = [learning_rate_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[55] == pytest.approx(0.6) and 0.2 < factors[99] < 0.201 and sorted(factors[10:], reverse=True) == factors[10:]
    assert learning_rate_factor(0, 100, 0.0) == 1.0
