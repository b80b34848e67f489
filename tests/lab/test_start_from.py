"""Trainings that start from a finished one, and learn from its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from kronblocks import KronblocksError, ScheduleConfig
from kronblocks_lab.training import train as training
from kronblocks_lab.training.settings import TrainConfig

pytestmark = pytest.mark.slow

QUIET = {"data": "digits", "widths": (64, 32), "batch_size": 64, "progress": False, "threads": 1, "block_size": "8"}


def config(out: Path, **settings) -> TrainConfig:
    return TrainConfig(**{"out": out, "epochs": 3, **QUIET, **settings})


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("dense") / "run"
    return out, training.train(config(out, method="dense", epochs=12))


@pytest.mark.filterwarnings("ignore::kronblocks.core.errors.PerformanceWarning")
@pytest.mark.parametrize("method", ["static", "rigl", "magnitude", "two-phase", "dense"])
def test_it_starts_from_the_trained_weights(dense, tmp_path, method):
    settings = {"lr": 1e-12, "epochs": 1} | ({"sparsity": 0.0} if method != "dense" else {})
    if method == "two-phase":
        settings |= {"rank": 64, "tile_groups": 1}
    result = training.train(config(tmp_path / "run", method=method, start_from=dense[0], **settings))
    assert result["test_accuracy"] == pytest.approx(dense[1]["test_accuracy"], abs=1e-6)


@pytest.mark.parametrize("method", ["static", "rigl", "magnitude", "two-phase"])
def test_it_becomes_sparse_and_stays_good(dense, tmp_path, method):
    out = tmp_path / "run"
    result = training.train(config(out, method=method, start_from=dense[0], distill=0.5, sparsity=0.75, epochs=8))
    assert result["block_sparsity"] >= 0.7 and result["test_accuracy"] > 0.75
    assert result["config"]["start_from"] == str(dense[0])


def test_the_teacher_is_counted(dense, tmp_path):
    results = [
        training.train(config(tmp_path / str(share), method="static", start_from=dense[0], distill=share, measure_plans=False))
        for share in (None, 0.5)
    ]
    images = results[0]["history"][-1]["step"], (64 * 64 + 64 * 32 + 32 * 10)
    extra = results[1]["training_macs"] - results[0]["training_macs"]
    assert extra % images[1] == 0 and (images[0] - 3) * 64 < extra // images[1] <= images[0] * 64


def test_interrupted_and_resumed_equals_uninterrupted(dense, tmp_path, monkeypatch):
    def settings(name):
        schedule = ScheduleConfig(update_every=5)
        return config(tmp_path / name, method="rigl", start_from=dense[0], distill=0.5, schedule=schedule, resume=True)

    whole = training.train(settings("whole"))

    def stop(self):
        if self.current_epoch == 1:
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(training.Classification, "on_train_epoch_start", stop)
        with pytest.raises(SystemExit):
            training.train(settings("parts"))
    again = training.train(settings("parts"))
    for name in ("test_loss", "validation_loss", "block_sparsity", "training_macs"):
        assert again[name] == whole[name]


def test_what_cannot_be_is_refused(dense, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KronblocksError, match="--start-from"):
        config(out, distill=0.5)
    with pytest.raises(KronblocksError, match="0 to 1"):
        config(out, start_from=dense[0], distill=2.0)
    with pytest.raises(KronblocksError, match="name a size"):
        config(out, start_from=dense[0], block_size="auto")
    for wrong, says in (
        ({"start_from": tmp_path}, "holds no trained model"),
        ({"start_from": dense[0], "widths": (32,)}, "holds no mlp for digits"),
    ):
        with pytest.raises(KronblocksError, match=says):
            training.train(config(out, **wrong))
        assert not out.exists()
