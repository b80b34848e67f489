"""Several trainings of one task, each in a process of its own, and one report."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from kronblocks.errors import KronblocksError
from kronblocks.experiments.apart import train_apart
from kronblocks.experiments.report import write_report
from kronblocks.experiments.results import find_runs
from kronblocks.experiments.runs import finished
from kronblocks.experiments.tasks import CompareConfig


def compare(config: CompareConfig) -> Path:
    """Run what is not done yet and write the report; returns its path.

    Raises:
        KronblocksError: the folder holds something and --resume was not given, or a training failed. What is done stays, and the
            same command with --resume goes on from there.
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
    return write_report(find_runs([run.out.expanduser() for run in runs]), out)
