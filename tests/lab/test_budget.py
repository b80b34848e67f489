"""Trainings within a budget of time: how many steps fit, with a stand-in clock, and that they stay the same when resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.lab.test_language import config as text
from tests.lab.test_train import Interrupt, config, lasting

from kronblocks import KronblocksError
from kronblocks.algorithms.schedule import SparsitySchedule
from kronblocks.core.files import write_json
from kronblocks_lab.commands import compare
from kronblocks_lab.training import budget
from kronblocks_lab.training import train as training
from kronblocks_lab.training.budget import measured, profile_of, set_length_, steps_within, updates
from kronblocks_lab.training.clock import Reading
from kronblocks_lab.training.settings import CompareConfig
from kronblocks_lab.training.tasks import task_of


def schedule(steps: int) -> SparsitySchedule:
    return SparsitySchedule(0.9, steps, start=0.05, end=0.4, lift_at=2 / 3, update_every=50)


def times(plan: SparsitySchedule) -> list[float]:
    """A step takes what its density costs; updates, and the steps after them, take longer, as do the first two."""
    changes = set(updates(plan))
    found = []
    for step in range(1, plan.total_steps + 1):
        dense = 1 - plan.sparsity_at(max([change for change in changes if change < step], default=0))
        extra = 0.5 * (step in changes) + 0.2 * (step - 1 in changes)
        found.append(0.1 + dense + extra + 5.0 * (step <= 2))
    return found


def test_a_short_training_tells_what_a_long_one_takes():
    profile = profile_of(times(schedule(100)), schedule(100))
    assert profile.update == pytest.approx(0.7)
    assert profile.points[0] == (0, pytest.approx(1.1)) and profile.points[-1] == (0.4, pytest.approx(0.2))
    for steps in (200, 1000, 5000):
        took = sum(times(schedule(steps))) - 10.0  # without the first two steps' start
        assert profile.seconds(schedule(steps)) == pytest.approx(took, rel=0.02)


def test_interrupted_steps_do_not_count():
    plain = times(schedule(100))
    disturbed = [time * (20 if step == 80 else 1) for step, time in enumerate(plain, 1)]
    assert profile_of(disturbed, schedule(100)) == profile_of(plain, schedule(100))


@pytest.mark.parametrize("seconds", [30.0, 100.0, 1234.5])
def test_one_more_step_would_not_fit(seconds):
    profile = profile_of(times(schedule(100)), schedule(100))
    steps = steps_within(seconds, profile, schedule)
    assert profile.seconds(schedule(steps)) <= seconds < profile.seconds(schedule(steps + 1))
    assert steps_within(0.5, profile, schedule) == 0


class Ticks:
    """A clock on which each reading is later by as much."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.count = seconds, 0

    def __call__(self) -> Reading:
        self.count += 1
        return Reading(self.seconds * self.count, 2 * self.seconds * self.count, None)


def find(out: Path, seconds: float, **settings):
    wanted = config(out, method="static", **{"epochs": 8, "budget_seconds": 6.001, **settings})
    task = task_of(wanted)
    return measured(wanted, task, training._module, Ticks(seconds)), task


@pytest.mark.parametrize(("clock", "steps"), [("wall", 300), ("cpu", 150)])
def test_the_steps_that_fit_are_found_and_spread_over_epochs(tmp_path, clock, steps):
    found, task = find(tmp_path, 0.02, budget_clock=clock)
    assert found["steps"] == task.steps == steps
    assert found["estimated_seconds"] == pytest.approx(0.02 * steps * (2 if clock == "cpu" else 1))  # at most 6, whole epochs
    assert task.epoch_steps <= 21  # 1,294 images in batches of 64
    assert found["timed_steps"] == 100 and found["timing_seconds"] == pytest.approx(0.02 * 106)  # with the starts of 5 epochs


def test_a_budget_that_is_too_short_is_refused_after_a_few_steps(tmp_path):
    with pytest.raises(KronblocksError, match=r"a step of static takes 2 s here.*6\.001: give it 200"):
        find(tmp_path, 2.0)


def test_a_budget_for_fewer_steps_than_epochs_is_refused(tmp_path):
    wanted = text(tmp_path / "run", None, method="static", steps=None, epochs=50, budget_seconds=6.001)
    with pytest.raises(KronblocksError, match="too short for static, of which 20 steps take 4 s here: give it more or fewer"):
        measured(wanted, task_of(wanted), training._module, Ticks(0.2))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget_seconds": 0.0}, "--budget-seconds 0 leaves no time"),
        ({"budget_seconds": -1.0}, "--budget-seconds"),
        ({"budget_seconds": 5.0, "epochs": 3}, "--epochs says how long to train, and so does --budget-seconds"),
        ({"budget_seconds": 5.0, "block_size": "auto"}, "--block-size auto has no budget of time"),
        ({"budget_seconds": 5.0, "budget_clock": "cpu", "threads": 2}, "add --threads 1"),
        ({"budget_clock": "cpu"}, "--budget-clock is the clock of --budget-seconds"),
        ({"evaluate_every": 0}, "--evaluate-every must be at least 1"),
        ({"evaluate_samples": 10}, "add --evaluate-every STEPS"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, says):
    with pytest.raises(KronblocksError, match=says):
        config(tmp_path, **{"epochs": 8, **settings})


def known(out: Path, steps: int) -> Path:
    """A folder whose training has its length, as after a timing."""
    task = task_of(config(out))
    set_length_(task, steps)
    out.mkdir()
    length = {"epochs": task.epochs, "epoch_steps": task.epoch_steps, "steps": task.steps}
    write_json(out / budget.FILE, {**length, "seconds": 9.0, "clock": "wall", "estimated_seconds": 9.0})
    return out


def test_a_resumed_training_has_the_steps_that_were_found_first(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "measured", lambda *_: pytest.fail("timed again"))
    settings = {"budget_seconds": 9.0, "epochs": 8, "evaluate_every": 7, "resume": True}
    whole = training.train(config(known(tmp_path / "whole", 45), **settings))
    assert [each["step"] for each in whole["history"]] == [15, 30, 45]
    assert [each["step"] for each in whole["evaluations"]] == [7, 14, 21, 28, 35, 42, 45]

    class Dies(training.Classification):
        def on_train_batch_start(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 3:
                raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "Classification", Dies)
        with pytest.raises(Interrupt):
            training.train(config(known(tmp_path / "parts", 45), **settings))
    assert lasting(training.train(config(tmp_path / "parts", **settings))) == lasting(whole)


def test_a_folder_whose_budget_was_too_short_can_be_used_again(tmp_path, monkeypatch):
    def too_short(*_):
        raise KronblocksError("too short")

    monkeypatch.setattr(budget, "measured", too_short)
    with pytest.raises(KronblocksError, match="too short"):
        training.train(config(tmp_path / "run", epochs=8, budget_seconds=1.0))
    assert not (tmp_path / "run" / "config.json").exists()


def test_evaluations_in_between_change_nothing(tmp_path):
    plain = training.train(config(tmp_path / "plain", epochs=1))
    often = training.train(config(tmp_path / "often", epochs=1, evaluate_every=10, evaluate_samples=1000))
    assert often["test_loss"] == plain["test_loss"] and plain["evaluations"] == []
    last = often["evaluations"][-1]
    assert [each["step"] for each in often["evaluations"]] == [10, 20, 21]
    assert last["validation_loss"] == pytest.approx(often["validation_loss"], rel=1e-5)  # of all images, in other batches
    assert last["training_macs"] == often["training_macs"] and last["block_sparsity"] == often["block_sparsity"]


def test_seeds_of_a_comparison_have_the_same_length(tmp_path, monkeypatch):
    shared = {"data": "digits", "widths": (64,), "budget_seconds": 9.0, "threads": 1}
    runs = CompareConfig(out=tmp_path, methods=("dense", "static"), seeds=(0, 1), **shared).runs()
    begun = []

    def begin(run):
        file = run.out / budget.FILE
        begun.append((run.method, run.seed, json.loads(file.read_text())["steps"] if file.exists() else None))
        run.out.mkdir(exist_ok=True)
        write_json(file, {"steps": {"dense": 100, "static": 200}[run.method]})

    monkeypatch.setattr(compare, "train_apart", begin)
    compare._train(runs)
    assert begun == [("dense", 0, None), ("static", 0, None), ("dense", 1, 100), ("static", 1, 200)]
