"""`kronblocks search`: the block-size search on the data sets and models of the experiments."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from kronblocks.config.parts import BlockSettings, BlockSizeLike, MethodChoice
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_json
from kronblocks.search.config import Goal, MixtureConfig, SearchConfig, Weights
from kronblocks_lab.report.search_figure import draw
from kronblocks_lab.training.model_settings import ModelAndData
from kronblocks_lab.training.searching import search_for
from kronblocks_lab.training.settings import TrainConfig
from kronblocks_lab.training.tasks import task_of
from kronblocks_lab.training.versions import versions


@dataclass(frozen=True, kw_only=True)
class FindConfig(MethodChoice, BlockSettings, ModelAndData):
    """Settings of `kronblocks search`."""

    out: Path | None = None
    """Folder for the report: search.json and search.png."""
    block_size: tyro.conf.SuppressFixed[tyro.conf.Fixed[BlockSizeLike]] = "auto"
    sizes: tuple[str, ...] | None = None
    """Candidates, such as 4 8 16x4; unset: squares with sides 2, 4, ... 64."""
    goal: Goal = "step-time"
    """What to minimise among candidates that lose nothing."""
    criterion: Literal["halving", "removal", "penalty"] = "halving"
    """How candidates are judged: short trainings side by side (halving), or in one model by removal or by the paper's penalty."""
    per_layer: bool = False
    """Find a size for each layer, not one for all; with --criterion removal or penalty."""
    weights: Weights = "time"
    """Divide a candidate's loss or penalty by its time, or treat all as equal (as the paper); not with --criterion halving."""
    strength: float | None = None
    """Strength of the penalty at the start, with --criterion penalty; unset: 10. It ends at 10 times that."""
    budget: float | None = None
    """Steps of the search, as a share of the training's; unset: 1 with --criterion halving, else 0.5, or more if needed."""
    tolerance: float = SearchConfig.tolerance
    """A candidate loses nothing if its held-out loss is at most this share above the best; with --criterion halving."""
    seed: int = 0

    def __post_init__(self) -> None:
        ModelAndData.__post_init__(self)
        if self.sizes is not None and len(self.sizes) < 2:
            given = f"names {self.sizes[0]} alone" if self.sizes else "names no block size"
            raise KronblocksError(f"--sizes {given}: a search needs at least two, such as 4 8 16x4, or leave it out")
        if self.per_layer and self.criterion == "halving":
            raise KronblocksError("--per-layer needs --criterion removal or penalty: halving tries one size for the whole model")
        if self.weights != "time" and self.criterion == "halving":
            raise KronblocksError("--weights is for --criterion removal or penalty: halving has --goal")
        if self.strength is not None and self.criterion != "penalty":
            raise KronblocksError(f"--strength is for --criterion penalty: {self.criterion} has no penalty")
        if self.tolerance != SearchConfig.tolerance and self.criterion != "halving":
            raise KronblocksError(f"--tolerance is for --criterion halving, not {self.criterion}")
        if self.goal != "step-time" and self.criterion != "halving":
            raise KronblocksError(f"--goal is for --criterion halving: {self.criterion} weighs candidates by their step time")
        self.training()

    def training(self) -> TrainConfig:
        """The training that would follow."""
        names = {field.name for kind in (MethodChoice, BlockSettings, ModelAndData) for field in dataclasses.fields(kind)}
        shared = {name: getattr(self, name) for name in names}
        return TrainConfig(out=Path(), candidates=self.sizes, seed=self.seed, **shared)


def main(config: Annotated[FindConfig, tyro.conf.arg(name="")]) -> None:
    """Find the block size for a model and its data: the cheapest one that loses nothing."""
    config.use_threads()
    training = config.training()
    task = task_of(config)
    if config.criterion == "halving":
        search = SearchConfig(config.sizes, config.goal, config.budget, tolerance=config.tolerance, seed=config.seed)
    else:
        search = MixtureConfig(
            criterion=config.criterion,
            weights=config.weights,
            per_layer=config.per_layer,
            budget=config.budget,
            strength=MixtureConfig.strength if config.strength is None else config.strength,
            seed=config.seed,
        )
    report = search_for(training, task, search)
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(report), markup=False)
    chosen = str(report.winner) if report.winner else ", ".join(f"{name} {size}" for name, size in report.chosen.items())
    console.print(f"found: {chosen}, in {report.seconds:.1f} s and {report.steps:,} steps")
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_json(config.out / "search.json", {**report.to_dict(), "config": training.settings(), "versions": versions()})
        draw(report, config.out / "search.png")
        console.print(f"report: {config.out.resolve()}")
