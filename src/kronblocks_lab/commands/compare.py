"""`kronblocks compare`: several trainings of one task, each in its own process, and one report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json, write_json
from kronblocks_lab.commands.report import say_where
from kronblocks_lab.report.costs import number
from kronblocks_lab.report.measures import Measure, measure_of
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs
from kronblocks_lab.report.sizes import FILE, Sizes, Tried
from kronblocks_lab.training.apart import train_apart
from kronblocks_lab.training.budget import FILE as LENGTH
from kronblocks_lab.training.runs import finished
from kronblocks_lab.training.settings import CompareConfig, TrainConfig


def main(config: Annotated[CompareConfig, tyro.conf.arg(name="")]) -> None:
    """Run several methods and seeds of one task, if they are not finished yet, and write one report.

    Raises:
        KronblocksError: the folder is not empty and --resume was not given; or a training failed. Finished trainings stay, and
            the same command with --resume goes on from there.
    """
    out = config.out.expanduser()
    if not config.resume and out.is_dir() and any(out.iterdir()):
        raise KronblocksError(f"{out} is not empty: add --resume to go on with what is there, or choose another --out")
    runs = _of_chosen_sizes(config) if config.try_sizes else config.runs()
    _train(runs)
    say_where(write_report(find_runs([run.out.expanduser() for run in runs]), out))


def _train(runs: Sequence[TrainConfig]) -> None:
    """One after the other, since trainings at the same time would measure each other's seconds."""
    console = Console(stderr=True)
    for number_of, run in enumerate(runs, 1):
        done = finished(run.out.expanduser()) is not None
        line = f"[{number_of}/{len(runs)}] {run.out.name}{': done before' if done else ''}"
        console.print(line, markup=False, highlight=False)
        if run.budget_seconds is not None:
            _share_length(run, runs)
        train_apart(run)


def _share_length(run: TrainConfig, runs: Sequence[TrainConfig]) -> None:
    """Let a training have as many steps as one that differs in the seed only and began before it."""
    own = run.out.expanduser() / LENGTH
    alike = [other for other in runs if dataclasses.replace(other, seed=run.seed, out=run.out) == run]
    known = next((file for other in alike if (file := other.out.expanduser() / LENGTH).exists()), None)
    if known is not None and not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        write_json(own, read_json(known))


def _of_chosen_sizes(config: CompareConfig) -> list[TrainConfig]:
    """The trainings of the sizes that are best on validation data, which are tried with the first seed and noted down."""
    first = config.seeds[0]
    trials = {size: [run for run in config.runs(size) if run.seed == first] for size in config.try_sizes}
    _train([run for runs in trials.values() for run in runs])
    found = [
        (run, size, result)
        for size, runs in trials.items()
        for run in runs
        if (result := finished(run.out.expanduser())) is not None
    ]
    measure = measure_of(found[0][2]["config"])
    best = {
        method: min(
            (each for each in found if each[0].method == method), key=lambda each: _badness(measure, each[2]), default=found[0]
        )[1]
        for method in dict.fromkeys(config.methods)
    }
    tried = [
        Tried(
            run.method,
            size,
            run.out.name,
            result[f"validation_{measure.name}"],
            result["budget"]["steps"],
            size == best[run.method],
        )
        for run, size, result in found
    ]
    write_json(config.out.expanduser() / FILE, Sizes(first, measure.name, tuple(tried)).to_dict())
    every = {size: config.runs(size) for size in dict.fromkeys(best.values())}
    return [run for size, runs in every.items() for run in runs if best[run.method] == size]


def _badness(measure: Measure, result: dict) -> float:
    """Of validation data; infinite where it is not finite."""
    value = measure.badness(number(result[f"validation_{measure.name}"]))
    return math.inf if math.isnan(value) else value
