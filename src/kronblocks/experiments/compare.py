"""Several trainings of one task, each in a process of its own, and one report."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

from rich.console import Console

from kronblocks.errors import KronblocksError
from kronblocks.experiments.report import find_runs, write_report
from kronblocks.experiments.runs import finished
from kronblocks.experiments.tasks import CompareConfig, TrainConfig


def train_apart(config: TrainConfig) -> None:
    """Train in a process of its own, so that neither memory nor threads of one training reach the next.

    Raises:
        KronblocksError: the training failed; it has said why on stderr.
        KeyboardInterrupt: it was interrupted.
    """
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(config,), name=config.out.name)
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:
        process.join()
        raise
    if process.exitcode == 130:
        raise KeyboardInterrupt
    if process.exitcode:
        raise KronblocksError(f"the training in {config.out} failed (see above); what it finished is kept, to go on from")


def _train(config: TrainConfig) -> None:
    """What the new process does; its exit code tells how it went."""
    from kronblocks.experiments.train import train

    try:
        train(config)
    except KronblocksError as error:
        sys.stderr.write(f"kronblocks: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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
