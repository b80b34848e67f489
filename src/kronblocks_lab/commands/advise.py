"""The subcommand `advise`: progress while it measures, tables, and JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kronblocks.advice.measuring import advise
from kronblocks.advice.report import Advice, LayerAdvice, Way, label, percent, ratio, remarks, summary, title
from kronblocks.config.parts import BlockSettings
from kronblocks.config.sparsity import Frozen
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_json
from kronblocks.ops.costs.choice import milliseconds
from kronblocks_lab.training.threads import ThreadSettings


@dataclass(frozen=True, kw_only=True)
class AdviseConfig(ThreadSettings, BlockSettings):
    """Settings of `kronblocks advise`."""

    layers: tyro.conf.Positional[tuple[str, ...]]
    """Shapes (out x in) such as 1024x1024 or 4096x1024*12, package.module:function for a model, or a .safetensors file."""
    rows: int
    """Rows of x per step: batch, times tokens."""
    sparsity: tuple[float, ...] = (0.8, 0.9, 0.95)
    """Shares of zero blocks to try."""
    frozen: Frozen = "keep"
    """What to do with a model's layers with requires_grad=False: keep them dense, as a training does, or sparsify them."""
    device: str = "cpu"
    """The device to time on: cpu, or cuda."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """The type of weights and inputs."""
    json: Path | None = None
    """Also write the results into this JSON file."""
    progress: Annotated[bool, tyro.conf.FlagConversionOff] = True
    """Show what is being timed."""

    def __post_init__(self) -> None:
        BlockSettings.__post_init__(self)
        ThreadSettings.__post_init__(self)


def main(config: Annotated[AdviseConfig, tyro.conf.arg(name="")]) -> None:
    """Measure a model's shapes on this machine: which layers to keep dense, factor or pack, and the gain."""
    config.use_threads()
    if config.json is not None and not config.json.expanduser().parent.is_dir():
        raise KronblocksError(f"there is no folder {config.json.parent} for --json {config.json}: make it, or choose another")
    show(_advise(config))


def _advise(config: AdviseConfig) -> Advice:
    columns = (TextColumn("timing {task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (config.progress and console.is_terminal)) as bar:
        task = bar.add_task("", total=None)
        advice = advise(
            config.layers,
            rows=config.rows,
            sparsity=config.sparsity,
            **{field.name: getattr(config, field.name) for field in fields(BlockSettings)},
            frozen=config.frozen,
            device=config.device,
            dtype=getattr(torch, config.dtype),
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if config.json is not None:
        try:
            write_json(config.json.expanduser(), advice.to_dict())
        except OSError as error:
            raise KronblocksError(f"cannot write {config.json}: {error.strerror}; choose another --json") from error
    return advice


def show(advice: Advice) -> None:
    """Print a table for each shape, and the whole model's gain."""
    console = Console()
    for layer in advice.layers:
        console.print(_table(layer))
        for line in remarks(layer):
            console.print(line, markup=False, highlight=False)
        console.print()
    total = Table(
        title="whole model, each layer in its best way", title_justify="left", show_header=False, box=None, pad_edge=False
    )
    for gain in advice.gains:
        total.add_row(f"{percent(gain.sparsity)} zeros", summary(gain))
    console.print(total)
    for line in advice.not_timed:
        console.print(f"not timed: {line}", markup=False, highlight=False)
    rank = "of a training" if advice.rank is None else advice.rank
    console.print(
        f"{advice.rows} rows, rank {rank}, {advice.dtype}, {advice.device}, {advice.threads} threads; "
        "times are the least of several turns. x: speed relative to dense, ± its spread between thirds of the turns. "
        "MiB: of weights. Only nn.Linear layers are counted.",
        style="dim",
        highlight=False,
    )


def _table(layer: LayerAdvice) -> Table:
    table = Table(title=title(layer), title_justify="left", box=None, pad_edge=False)
    for name in ("", "training", "", "inference", "", "MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    ways: list[Way | None] = [layer.dense, layer.factored, *layer.packed]
    for way in filter(None, ways):
        cells = [label(way)]
        for speed in (way.training, way.inference):
            cells += [f"{speed.plan} {milliseconds(speed.seconds):>8s}", ratio(speed)]
        table.add_row(*cells, f"{way.weight_bytes / 2**20:.2f}")
    return table
