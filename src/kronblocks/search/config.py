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
    """Settings of a search by short trainings.

    Args:
        sizes: the candidates; None: squares with sides 2, 4, ... 64.
        goal: what to minimise among candidates that lose nothing: "step-time" (of training), "inference-time", or "accuracy"
            (the held-out loss, whatever the cost).
        budget: steps of all trials together, as a share of the training that follows; None: 1, or more if a trial would get
            fewer than 20.
        rounds: number of rounds. After each about half of the candidates are dropped. Rounds have other batches and factors,
            and the mean over rounds counts, since single trainings differ by a percent or two by chance.
        most: most candidates that are tried.
        tolerance: a candidate loses nothing if its held-out loss is at most this share above the best, plus the standard error
            of the difference.
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
    """Settings of a search in a mixture.

    Args:
        criterion: "removal": at even intervals remove the candidate whose removal adds least held-out loss for its time.
            "penalty" (the paper's): a growing group penalty on the norm of each candidate's weight, until one is left. Alone
            it tends to keep the candidate with most parameters, whatever the data.
        weights: divide a candidate's loss or penalty by the "time" it takes, or treat all as "equal".
        per_layer: each layer keeps its own candidate; else one size for the model.
        budget: steps, as a share of the training that follows; None: 0.5, or more if a removal would come after fewer than 20.
        train_first: share of these steps before the first removal.
        strength: of the penalty at first: how much norm it would remove over all steps, as a multiple of the candidates' mean
            norm. If it is too weak, several candidates are left, and the one of greatest norm is kept.
        growth: factor by which the strength has grown at the end; it grows by the same factor at each step.
        most: most candidates in a layer.
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
