"""How many steps fit into a budget of time: a short training of the same form, timed step by step, and its times scaled."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from kronblocks.algorithms.schedule import LEAST_UPDATES, SparsitySchedule
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json, write_json
from kronblocks.surgery.sparsify import schedule_of
from kronblocks_lab.training.clock import Reading, reading
from kronblocks_lab.training.module import Training
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.tasks import ImageTask, Task, TextTask

TIMED = 100
"""Steps of the short training: with fewer, every step would update the masks."""

FILE = "budget.json"

_WARM = 2  # first steps, which are slower
_HICCUP = 3.0  # a step that takes so many medians was interrupted
_MOST = 10.0  # the timing may take so many budgets


Make = Callable[[TrainConfig, ImageTask | TextTask], Training]
"""Makes the module that trains."""


class Profile(NamedTuple):
    """What steps take in the course of a training.

    Args:
        points: pairs of a share of the training and the seconds of a step after an update of the masks there, in order.
        update: seconds that an update takes beside its step.
    """

    points: tuple[tuple[float, float], ...]
    update: float

    def seconds(self, schedule: SparsitySchedule) -> float:
        """Of a training with this schedule."""
        places, total = edges(schedule), len(updates(schedule)) * self.update
        shares = [place / schedule.total_steps for place in places[:-1]]
        steps = np.interp(shares, [share for share, _ in self.points], [seconds for _, seconds in self.points])
        return total + float(np.diff(places) @ steps)


def edges(schedule: SparsitySchedule) -> list[int]:
    """Steps between which all steps do the same: first and last of the training, the start of pruning, and mask updates."""
    changes = updates(schedule)
    return sorted({0, *([schedule.start_step] if changes else []), *changes, schedule.total_steps})


def updates(schedule: SparsitySchedule) -> list[int]:
    """The steps after which masks are updated.

    >>> updates(SparsitySchedule(0.9, total_steps=100, start=0.1, end=0.5, update_every=10))[-3:]
    [42, 46, 50]
    """
    found, step = [], schedule.start_step
    while schedule.prunes and step < schedule.end_step:
        step = schedule.next_update(step)
        found.append(step)
    return found


def profile_of(times: Sequence[float], schedule: SparsitySchedule) -> Profile:
    """What steps take, from a training in which all were timed.

    Between two updates of the masks all steps do the same. The update's own step and the one after it, which may measure plans,
    are left out there; what they take more is an update's time.

    Args:
        times: seconds of each step; at least `TIMED` of them tell something.
        schedule: of that training.
    """
    changes = updates(schedule)
    apart = {*range(1, _WARM + 1), *changes, *(step + 1 for step in changes)}
    points: list[tuple[float, float]] = []
    extra: list[float] = []
    for first, last in itertools.pairwise(edges(schedule)):
        clean = [times[step - 1] for step in range(first + 1, last + 1) if step not in apart]
        if not clean:
            continue  # its neighbours tell
        seconds = _mean(clean)
        if first in changes and points:
            extra.append(times[first - 1] - points[-1][1] + times[first] - seconds)
        points.append((first / len(times), seconds))
    return Profile(tuple(points), max(0.0, statistics.median(extra)) if extra else 0.0)


def _mean(times: Sequence[float]) -> float:
    """Without interrupted steps."""
    middle = statistics.median(times)
    return statistics.fmean(time for time in times if time <= _HICCUP * middle)


def steps_within(seconds: float, profile: Profile, schedule: Callable[[int], SparsitySchedule]) -> int:
    """The most steps of a training that takes at most so many seconds; 0 if there is none.

    Args:
        seconds: of the budget.
        profile: what steps take.
        schedule: gives the schedule for a number of steps.
    """
    low, high = 0, int(seconds / min(time for _, time in profile.points)) + 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = middle < LEAST_UPDATES or profile.seconds(schedule(middle)) <= seconds
        low, high = (middle, high) if fits else (low, middle - 1)
    return low if low >= LEAST_UPDATES else 0


class _StepTimes(Callback):
    """Seconds of each step, on a clock that waits for a GPU."""

    def __init__(self, config: TrainConfig, read: Callable[[], Reading]) -> None:
        self.times: list[float] = []
        self._config, self._read, self._before = config, read, 0.0

    def _now(self) -> float:
        now = self._read()
        return now.own if self._config.budget_clock == "cpu" else now.wall

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = self._now()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.append((now := self._now()) - self._before)
        self._before = now
        budget = self._config.budget_seconds
        assert budget is not None
        if len(self.times) == _WARM + 2 and TIMED * min(self.times) > _MOST * budget:
            raise KronblocksError(
                f"a step of {self._config.method} takes {min(self.times):.2g} s here, too long for --budget-seconds {budget:g}: "
                f"give it {TIMED * min(self.times):.0f} or more"
            )


def set_length_(task: Task, steps: int) -> None:
    """Let a task have at most so many steps, at least one an epoch, all epochs alike.

    A text has as many epochs as before. Images have as many as are needed to see no image twice in one, or up to half as many
    more to come nearer to the steps; where epochs are shorter than the data, each sees another random part.
    """
    if not task.config.is_text:
        least = -(-steps // task.whole_epoch)
        task.epochs = max(range(max(least, 1), least + least // 2 + 2), key=lambda epochs: steps // epochs * epochs)
    task.epoch_steps = max(1, steps // task.epochs)


def measured(
    config: TrainConfig,
    task: ImageTask | TextTask,
    make: Make,
    read: Callable[[], Reading] = reading,
) -> dict[str, Any]:
    """Time a short training of the same form, and find the number of steps for the budget.

    Args:
        config: with `budget_seconds`.
        task: of the training; its length is changed meanwhile.
        make: makes the module that trains.
        read: gives the time.

    Returns:
        What `budget.json` holds, plain values: the length, how it was found, and what it should take.

    Raises:
        KronblocksError: too few steps fit.
    """
    budget = config.budget_seconds
    assert budget is not None
    plain = {"budget_seconds": None, "budget_clock": "wall", "evaluate_every": None, "evaluate_samples": None}
    set_length_(task, TIMED)
    short = make(dataclasses.replace(config, **plain), task)
    watch, start = _StepTimes(config, read), read().wall
    Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=task.epochs,
        limit_train_batches=task.epoch_steps,
        limit_val_batches=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        deterministic="warn",
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
    ).fit(short, task.train_batches(config.seed), task.validation_batches())
    if len(watch.times) < task.steps:
        raise KeyboardInterrupt  # which Lightning keeps to itself
    schedule = schedule_of(config.sparsity_config())
    profile = profile_of(watch.times, schedule(task.steps))
    steps = steps_within(budget, profile, schedule)
    set_length_(task, steps)
    if task.steps > steps or not schedule(task.steps).prunes:
        least = profile.seconds(schedule(2 * LEAST_UPDATES))
        raise KronblocksError(
            f"--budget-seconds {budget:g} is too short for {config.method}, of which {2 * LEAST_UPDATES} steps take "
            f"{least:.2g} s here: give it more{' or fewer --epochs' if task.config.is_text else ''}"
        )
    return {
        "seconds": budget,
        "clock": config.budget_clock,
        "epochs": task.epochs,
        "epoch_steps": task.epoch_steps,
        "steps": task.steps,
        "estimated_seconds": profile.seconds(schedule(task.steps)),
        "timed_steps": len(watch.times),
        "timing_seconds": read().wall - start,
        "points": [list(point) for point in profile.points],
        "update_seconds": profile.update,
    }


def fit_to_budget_(task: ImageTask | TextTask, config: TrainConfig, folder: Path, make: Make) -> dict[str, Any] | None:
    """Give a task the length that fits the budget: what the folder knows, or what a timing finds, which is then kept there.

    So the number of steps is fixed before the first one, and a resumed training has the same.

    Returns:
        What the folder's `budget.json` holds; None without a budget.

    Raises:
        KronblocksError: too few steps fit, or the file is damaged.
    """
    if config.budget_seconds is None:
        return None
    file = folder / FILE
    if not file.exists():
        write_json(file, measured(config, task, make))
    known = read_json(file)
    try:
        task.epochs, task.epoch_steps = (int(known[name]) for name in ("epochs", "epoch_steps"))
    except (KeyError, TypeError, ValueError) as error:
        raise KronblocksError(f"{file} says no number of steps: delete the folder {folder}, and train again") from error
    return known
