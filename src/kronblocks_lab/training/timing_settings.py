"""The settings of a training that are about time: how often it is evaluated, and how long it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError

BudgetClock = Literal["wall", "cpu"]


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How often a training is evaluated, and how long it may take."""

    evaluate_every: int | None = None
    """Training steps between evaluations for curves of quality over time; unset: after each epoch only."""
    evaluate_samples: int | None = None
    """Validation samples of each, always the same; unset: as many as cost a tenth of the steps between, or all."""
    budget_seconds: float | None = None
    """Seconds of training, evaluations apart; a short timing first finds the steps that fit. Unset: --epochs or --steps."""
    budget_clock: BudgetClock = "wall"
    """cpu: the budget counts seconds of the process's one thread (--threads 1), which others on the machine disturb less."""

    def __post_init__(self) -> None:
        for name in ("evaluate_every", "evaluate_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise KronblocksError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.evaluate_samples is not None and self.evaluate_every is None:
            raise KronblocksError("--evaluate-samples is for evaluations between epochs: add --evaluate-every STEPS")
        if self.budget_seconds is not None:
            number("--budget-seconds", self.budget_seconds, 0, math.inf, "the seconds that a training may take, above 0")
            if self.budget_seconds == 0:
                raise KronblocksError("--budget-seconds 0 leaves no time to train: write a number above 0, or leave it out")
        elif self.budget_clock != "wall":
            raise KronblocksError("--budget-clock is the clock of --budget-seconds: add that, or leave it out")

    def check_budget(self, *, threads: int | None, block_size: object, steps: int | None, epochs: bool) -> None:
        """Refuse settings that do not go together with a budget.

        Args:
            threads: that torch uses; None: its own choice.
            block_size: asked for.
            steps: that the user asked for.
            epochs: whether the user chose a number of epochs that would do nothing.

        Raises:
            KronblocksError: one does not.
        """
        if self.budget_seconds is None:
            return
        if block_size == "auto":
            raise KronblocksError("--block-size auto has no budget of time: find a size with kronblocks search, then name it")
        for name, given in (("--steps", steps is not None), ("--epochs", epochs)):
            if given:
                raise KronblocksError(f"{name} says how long to train, and so does --budget-seconds: leave one of them out")
        if self.budget_clock == "cpu" and threads != 1:
            raise KronblocksError("--budget-clock cpu counts the seconds of one thread: add --threads 1, or leave it out")
