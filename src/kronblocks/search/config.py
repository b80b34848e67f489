"""What a user sets of a search for the block size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from kronblocks.config.parts import BlockSizeLike
from kronblocks.core.checks import number, one_of, whole

Goal = Literal["step-time", "inference-time", "accuracy"]


@dataclass(frozen=True)
class SearchConfig:
    """How block sizes are searched for.

    Args:
        sizes: the candidates; None: squares of powers of two from 2 to 64.
        goal: what counts among candidates that lose nothing: "step-time" (of training), "inference-time", or "accuracy" (the
            least held-out loss, whatever it costs).
        budget: steps of all trials together, as a share of the training that follows; None: 1, or more where that leaves a trial
            fewer than 20.
        rounds: after each of which about half of the candidates go. Each has other batches and factors, and what counts is a
            candidate's mean over all its rounds: two trainings that differ in nothing else end a percent or two apart.
        most: candidates that are tried at all.
        tolerance: share of the best held-out loss by which another candidate may be worse and still lose nothing. The standard
            error of the difference, over held-out examples, comes on top.
        seed: of the batches and the factors.
    """

    sizes: tuple[BlockSizeLike, ...] | None = None
    goal: Goal = "step-time"
    budget: float | None = None
    rounds: int = 3
    most: int = 6
    tolerance: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("goal", self.goal, Goal)
        if self.budget is not None:
            number("budget", self.budget, 1e-300, math.inf, "steps of all trials, as a share of the training's, above 0")
        number("tolerance", self.tolerance, 0, math.inf, "a share of the best held-out loss, from 0 on")
        whole("rounds", self.rounds, "the number of rounds")
        whole("most", self.most, "how many candidates are tried")


Criterion = Literal["removal", "penalty"]


Weights = Literal["time", "equal"]


@dataclass(frozen=True)
class MixtureConfig:
    """How candidates of a mixture are judged.

    Args:
        criterion: "removal": at evenly spaced moments the candidate goes whose removal adds least held-out loss for the time it
            takes. "penalty", the paper's: a growing group penalty on the norm of each candidate's weight, until one is left; with
            it alone the candidate with most parameters tends to win, whatever the data.
        weights: what a candidate's loss or penalty is measured against: the "time" it takes, or "equal".
        per_layer: each layer keeps a candidate of its own; else one size for the model.
        budget: steps, as a share of the training that follows; None: 0.5, or more where that leaves fewer than 20 before each
            removal.
        train_first: share of those steps before the first candidate may go.
        strength: of the penalty at first: what it would take from a candidate over all its steps, as a multiple of the mean norm
            of candidates. A weak one leaves several candidates, of which the one of greatest norm is kept.
        growth: how many times its strength the penalty has at the end; it grows by the same factor at each step.
        most: candidates in a layer.
        seed: of batches and factors.
    """

    criterion: Criterion = "removal"
    weights: Weights = "time"
    per_layer: bool = False
    budget: float | None = None
    train_first: float = 0.4
    strength: float = 10.0
    growth: float = 10.0
    most: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("criterion", self.criterion, Criterion)
        one_of("weights", self.weights, Weights)
        if self.budget is not None:
            number("budget", self.budget, 1e-300, math.inf, "a share of the training's steps, above 0")
        number("strength", self.strength, 1e-300, math.inf, "a number above 0")
        number("growth", self.growth, 1, math.inf, "how many times its strength the penalty has at the end, from 1 on")
        number("train_first", self.train_first, 0, 1, "a share of the steps, from 0 to below 1")
        whole("most", self.most, "how many candidates are tried")
