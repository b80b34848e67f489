"""`kronblocks compare`: several trainings of one task, each in its own process, and one report."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.commands.report import say_where
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs
from kronblocks_lab.training.apart import train_apart
from kronblocks_lab.training.runs import finished
from kronblocks_lab.training.settings import CompareConfig


def main(config: Annotated[CompareConfig, tyro.conf.arg(name="")]) -> None:
    """Run several methods and seeds of one task, if they are not finished yet, and write one report.

    Raises:
        KronblocksError: the folder is not empty and --resume was not given; or a training failed. Finished trainings stay, and
            the same command with --resume goes on from there.
    """
    out = config.out.expanduser()
    if not config.resume and out.is_dir() and any(out.iterdir()):
        raise KronblocksError(f"{out} is not empty: add --resume to go on with what is there, or choose another --out")
    runs = config.runs()
    console = Console(stderr=True)
    for number, run in enumerate(runs, 1):
        done = finished(run.out.expanduser()) is not None
        console.print(f"[{number}/{len(runs)}] {run.out.name}{': done before' if done else ''}", markup=False, highlight=False)
        train_apart(run)
    say_where(write_report(find_runs([run.out.expanduser() for run in runs]), out))
