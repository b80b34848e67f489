"""The subcommands of `kronblocks`; those of `bench` and `reproduce` have files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from kronblocks.errors import KronblocksError
from kronblocks.experiments.advise import AdviseConfig
from kronblocks.experiments.advise import run as run_advise
from kronblocks.experiments.bench.commands import bench
from kronblocks.experiments.deploy import ExportConfig, inspect, run_export
from kronblocks.experiments.reproduce.commands import reproduce
from kronblocks.experiments.search import FindConfig
from kronblocks.experiments.search import run as run_search
from kronblocks.experiments.tasks import CompareConfig, TrainConfig

DESCRIPTION = "Neural networks with block-sparse weights: train, compare, search, export, measure."


def _summary(config: TrainConfig, result: dict[str, Any]) -> Table:
    table = Table(title=f"{config.method} on {config.data}: {config.out}", show_header=False, title_justify="left")
    rows = {
        "test accuracy": f"{100 * result['test_accuracy']:.2f} %",
        "weights in zero blocks": f"{100 * result['block_sparsity']:.2f} %",
        "live blocks": f"{result['live_blocks']:,} of {result['total_blocks']:,}",
        "trained parameters": f"{result['trainable_parameters_max']:,} at most, {result['trainable_parameters_end']:,} at last",
        "training": f"{result['train_seconds']:.1f} s, {result['training_macs'] / 1e9:,.1f} G multiply-adds",
        "peak memory": f"{result['peak_memory_bytes'] / 2**20:.0f} MiB above the loaded data",
        "block sizes": _sizes(result) if config.method != "dense" else "",
        "left dense": "; ".join(f"{each['name']}: {each['reason']}" for each in result["surgery"]["left_dense"]),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


def _sizes(result: dict[str, Any]) -> str:
    """The block sizes that the layers really have."""
    layers: dict[str, list[str]] = {}
    for layer in result["layers"]:
        layers.setdefault(layer["block_size"], []).append(layer["name"])
    return (
        "; ".join(f"{size} in {', '.join(names)}" for size, names in layers.items())
        if len(layers) > 1
        else next(iter(layers), "")
    )


def train(config: Annotated[TrainConfig, tyro.conf.arg(name="")]) -> None:
    """Train one model and show what came out."""
    from kronblocks.experiments.train import train as run_training

    Console().print(_summary(config, run_training(config)))


def compare(config: Annotated[CompareConfig, tyro.conf.arg(name="")]) -> None:
    """Run several methods and seeds of one task and make one report."""
    from kronblocks.experiments.compare import compare as run_all

    _say_where(run_all(config))


def report(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Make the report of finished trainings again.

    Args:
        folders: folders of trainings, or folders that hold such folders.
        out: where report.html and report.md go; unset: the first folder.
    """
    from kronblocks.experiments.report import write_report
    from kronblocks.experiments.results import find_runs

    if not folders:
        raise KronblocksError("name at least one folder: kronblocks report runs/demo")
    _say_where(write_report(find_runs(folders), out or folders[0]))


def advise(config: Annotated[AdviseConfig, tyro.conf.arg(name="")]) -> None:
    """Measure a model's own shapes on this machine: what to keep dense, what to factor, what to pack, and what it gains."""
    run_advise(config)


def search(config: Annotated[FindConfig, tyro.conf.arg(name="")]) -> None:
    """Find the block size for a model and its data: the cheapest one that loses nothing."""
    run_search(config)


def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
    """Write a finished training's model in the form that runs fastest here."""
    run_export(config)


def _say_where(path: Path) -> None:
    Console().print(f"report: {path.resolve()}", soft_wrap=True, highlight=False)


def run(args: list[str] | None = None) -> None:
    """Read the command line and do what it says."""
    commands = {
        "train": train,
        "compare": compare,
        "report": report,
        "search": search,
        "advise": advise,
        "export": export,
        "inspect": inspect,
        "bench": bench,
        "reproduce": reproduce,
    }
    tyro.extras.subcommand_cli_from_dict(commands, args=args, prog="kronblocks", description=DESCRIPTION)
