"""ViTs by size: what they are, how they are trained, and that augmentation stays in training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.lab.test_train import Interrupt, lasting

from kronblocks import KronblocksError, ScheduleConfig
from kronblocks_lab.data.augment import Augmentation
from kronblocks_lab.training import train as training
from kronblocks_lab.training.models import build_model
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.tasks import ImageTask, task_of
from kronblocks_lab.training.trained import trained_model
from kronblocks_lab.training.vision import StochasticDepth, ViTSize, drop_branches_, vit_of_size


def config(out: Path, **settings) -> TrainConfig:
    small = {"model": "vit", "width": 16, "depth": 2, "patch": 4, "epochs": 2, "batch_size": 64, "train_images": 256}
    fixed = {"data": "digits", "progress": False, "threads": 1, "measure_plans": False, "test_images": 100, "block_size": "4"}
    return TrainConfig(**{"out": out, **fixed, **small, "schedule": ScheduleConfig(update_every=2), **settings})


def test_a_vit_sees_small_images_as_they_are():
    size = ViTSize(width=192, depth=6, heads=3, patch=4)
    with torch.device("meta"):
        model = build_model("vit", (3, 32, 32), 100, vit=size)
    blocks = 6 * (4 * 192 * 192 + 4 * 192 + 2 * 4 * 192 * 192 + 5 * 192 + 4 * 192)
    around = (3 * 16 * 192 + 192) + 192 + 65 * 192 + 2 * 192 + 100 * 193  # patches, class token, places of 64 + 1, norm, head
    assert sum(p.numel() for p in model.parameters()) == blocks + around
    seen = []
    model = vit_of_size((3, 32, 32), 10, ViTSize(16, 1, 2, 4))
    model.model.vit.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10) and seen == [(2, 65, 16)]


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (ViTSize(patch=5), "--patch 5 does not divide images of 32x32"),
        (ViTSize(width=100, heads=3), "--heads 3 must divide --width 100: for example --heads 2"),
    ],
)
def test_sizes_that_do_not_fit(size, says):
    with pytest.raises(KronblocksError, match=says):
        vit_of_size((3, 32, 32), 10, size)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"context": 8}, "--context is for --model decoder, not vit"),
        ({"model": "mlp", "widths": (8,)}, "--patch is for --model vit, not mlp"),
        ({"drop_path": 1.0}, "--drop-path is a share"),
        ({"label_smoothing": -0.1}, "--label-smoothing is a share"),
        ({"mixup": -1.0}, "--mixup is a number from 0 on"),
        ({"crop": -1}, "--crop is a number from 0 on"),
        ({"patch": 0}, "--patch must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, says):
    with pytest.raises(KronblocksError, match=says):
        config(tmp_path, **settings)


def test_augmentation_is_on_for_a_vit_on_cifar_and_nowhere_else(tmp_path):
    of = {
        (model, data): TrainConfig(out=tmp_path, model=model, data=data)
        for model in ("vit", "mlp")
        for data in ("cifar100", "mnist")
    }
    on = of["vit", "cifar100"]
    assert on.augmentation == Augmentation(4, True, 0.2, 0.1) and on.dropped == 0.1
    assert all(each.augmentation == Augmentation() and each.dropped == 0 for each in of.values() if each is not on)
    own = TrainConfig(out=tmp_path, model="vit", data="cifar100", mixup=0.0, flip=False, drop_path=0.0)
    assert own.augmentation == Augmentation(4, False, 0.0, 0.1) and own.dropped == 0
    assert own.settings()["mixup"] == 0.0 and own.settings()["crop"] == 4 and own.settings()["heads"] == 3
    assert (own.samples, own.recipe.weight_decay, own.course.clip) == (128, 0.05, 1.0)


def test_stochastic_depth_drops_branches_of_samples_and_keeps_their_mean():
    torch.manual_seed(0)
    branch = torch.randn(4000, 3, 2)
    dropped = StochasticDepth(0.3).train()(branch)
    is_kept = (dropped != 0).all(dim=(1, 2))
    assert torch.equal((dropped != 0).any(dim=(1, 2)), is_kept) and 0.67 < float(is_kept.float().mean()) < 0.73
    torch.testing.assert_close(dropped[is_kept], branch[is_kept] / 0.7)
    assert StochasticDepth(0.3).eval()(branch) is branch


def test_both_branches_of_each_block_drop_more_often_with_depth():
    torch.manual_seed(0)
    model = vit_of_size((1, 8, 8), 4, ViTSize(16, 3, 2, 4))
    x = torch.randn(5, 1, 8, 8)
    before = model.eval()(x)
    drop_branches_(model, 0.4)
    assert [layer.dropout.rate for layer in model.model.vit.layers] == [0.0, 0.2, 0.4]
    assert torch.equal(model.eval()(x), before) and not torch.equal(model.train()(x), before)
    calls = []
    model.model.vit.layers[2].dropout.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert len(calls) == 2


@pytest.mark.slow
def test_a_vit_trains_and_comes_back(tmp_path):
    result = training.train(config(tmp_path / "run", sparsity=0.5, crop=1, drop_path=0.1))
    assert 0.5 <= result["block_sparsity"] < 0.52 and result["source"] == {"title": "digits"}
    model, shape, _ = trained_model(tmp_path / "run")
    assert shape == (1, 8, 8) and sum(isinstance(each, StochasticDepth) for each in model.modules()) == 0


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    everything = {
        "crop": 1,
        "flip": True,
        "mixup": 0.3,
        "label_smoothing": 0.1,
        "drop_path": 0.2,
        "method": "static",
        "epochs": 3,
    }
    whole = training.train(config(tmp_path / "whole", **everything))
    plain = training.train(config(tmp_path / "plain", method="static", epochs=3))
    assert plain["validation_loss"] != whole["validation_loss"]

    class Dies(training.Classification):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 2 and batch_idx == 2:
                raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "Classification", Dies)
        with pytest.raises(Interrupt):
            training.train(config(tmp_path / "parts", **everything))
    torch.manual_seed(12345)
    resumed = training.train(config(tmp_path / "parts", **everything, resume=True))
    assert lasting(resumed) == lasting(whole)


def test_only_training_images_are_augmented(tmp_path):
    settings = config(tmp_path, crop=2, flip=True, mixup=0.5, label_smoothing=0.1)
    task, plain = task_of(settings), task_of(config(tmp_path))
    assert isinstance(task, ImageTask)
    for part in ("validation_batches", "test_batches"):
        for own, other in zip(getattr(task, part)(), getattr(plain, part)(), strict=True):
            assert all(map(torch.equal, own, other))
    batch = next(iter(plain.train_batches(0)))
    images, shares = next(task.endless_batches(0))
    assert images.shape == batch[0].shape and not torch.equal(images, batch[0]) and shares.shape == (64, 10)
    again = task.augmented(batch, 0, 0, 0)
    assert torch.equal(again[0], images) and torch.equal(again[1], shares)
    losses = task.losses(torch.zeros(64, 10), shares)
    assert losses.shape == (64,) and float(losses[0]) == pytest.approx(math.log(10))


def test_data_that_is_not_the_original_is_named(tmp_path):
    assert task_of(config(tmp_path, data_label="JPEG copies")).source == {"title": "digits (JPEG copies)"}
