"""The schedule of a training: sparsity and phase as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kronblocks.core.errors import KronblocksError, OtherSteps

Phase = Literal["discover", "refine", "heal"]
Shape = Literal["cubic", "linear", "staircase"]

LEAST_UPDATES = 10
"""Least number of mask updates in a pruning span, however short the run."""


@dataclass(frozen=True)
class SparsitySchedule:
    """Target sparsity and phase at every optimiser step (equation 16 in docs/math.md).

    Steps count finished optimiser steps, from 1. Pruning lasts from `start` to `end`, shares of `total_steps`. The mask is
    updated every `update_every` steps, or ten times over the span if that is more often. The lift and the end always update it.

    Phases: "discover" while pruning; "refine" from the lift on, if there is one; "heal", with the mask frozen, after the end.
    A trial of a script with fewer than ten steps may be too short to prune: then all of it is "discover".

    Source:
        The cubic shape: Zhu and Gupta, "To prune, or not to prune", 2017.

    >>> schedule = SparsitySchedule(0.9, total_steps=1000, start=0.05, end=0.5, lift_at=2 / 3)
    >>> schedule.start_step, schedule.lift_step, schedule.end_step
    (50, 350, 500)
    >>> round(schedule.sparsity_at(350), 3), schedule.sparsity_at(500), schedule.phase_at(400)
    (0.867, 0.9, 'refine')
    """

    target_sparsity: float
    total_steps: int
    start: float = 0.05
    end: float = 0.5
    lift_at: float | None = None  # share of the pruning span; None: no lift
    shape: Shape = "cubic"
    update_every: int = 50
    stages: int = 5  # of the staircase; each kills the same share of the live blocks
    initial_sparsity: float = 0.0  # before pruning; above 0 if a model is sparse already

    def __post_init__(self) -> None:
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise KronblocksError(f"total_steps is the number of optimiser steps of the training, not {self.total_steps!r}")
        if not self.prunes and self.total_steps >= LEAST_UPDATES:
            raise KronblocksError(f"{self.why_not}: let schedule.start and schedule.end be further apart")

    @property
    def prunes(self) -> bool:
        """Whether there is any mask update. A trial of a few steps may have none."""
        return self.end_step > self.start_step

    @property
    def why_not(self) -> str:
        """Why a schedule does not prune, in words."""
        steps = "1 step is" if self.total_steps == 1 else f"{self.total_steps} steps are"
        return f"{steps} too few to prune from {self.start} to {self.end} of the training"

    @property
    def start_step(self) -> int:
        """The last step before pruning."""
        return round(self.start * self.total_steps)

    @property
    def end_step(self) -> int:
        """The step of the last mask update; from then on the mask is frozen."""
        return round(self.end * self.total_steps)

    @property
    def lift_step(self) -> int | None:
        """The step after which the layers are lifted, or None."""
        if self.lift_at is None or not self.prunes:
            return None
        return min(self.start_step + max(1, round(self.lift_at * (self.end_step - self.start_step))), self.end_step)

    def fraction_at(self, step: int) -> float:
        """How much of the pruning span has passed, in [0, 1]; 0 where there is none."""
        if not self.prunes:
            return 0.0
        return min(max((step - self.start_step) / (self.end_step - self.start_step), 0.0), 1.0)

    def sparsity_at(self, step: int) -> float:
        """The target sparsity after this step."""
        fraction, first = self.fraction_at(step), self.initial_sparsity
        if fraction == 1.0:
            return self.target_sparsity
        match self.shape:
            case "cubic":
                return first + (self.target_sparsity - first) * (1 - (1 - fraction) ** 3)
            case "linear":
                return first + (self.target_sparsity - first) * fraction
            case "staircase":
                kept = (1 - self.target_sparsity) / (1 - first)
                return 1 - (1 - first) * kept ** (int(fraction * self.stages + 1e-9) / self.stages)

    def is_update(self, step: int) -> bool:
        """Whether the mask is updated after this step."""
        return self.start_step < step <= self.end_step and step == self.next_update(step - 1)

    def next_update(self, step: int) -> int:
        """The step of the first mask update after a step; that of the last one if none is left."""
        every = max(1, min(self.update_every, (self.end_step - self.start_step) // LEAST_UPDATES))
        regular = self.start_step + (max(step - self.start_step, 0) // every + 1) * every
        coming = [later for later in (regular, self.lift_step) if later is not None and step < later < self.end_step]
        return min(coming, default=self.end_step)

    def phase_at(self, step: int) -> Phase:
        """The phase that the model is in after this step."""
        if self.prunes and step >= self.end_step:
            return "heal"
        lift = self.lift_step
        return "refine" if lift is not None and step >= lift else "discover"


def continued(make: Callable[[int], SparsitySchedule], total_steps: int, known: int | None, step: int) -> SparsitySchedule:
    """The schedule of a training. A training that is made longer after its mask was frozen keeps the old schedule.

    Args:
        make: gives the schedule for a number of steps.
        total_steps: steps of the training.
        known: steps of the training so far; None: there was none.
        step: the step that it has reached.

    Raises:
        OtherSteps: the mask is not frozen yet, and another number of steps would move the schedule.
    """
    if known is None or known == total_steps or step == 0:
        return make(total_steps)
    before = make(known)
    if before.phase_at(step) != "heal":
        raise OtherSteps(known, before.end_step, step, total_steps)
    return before
