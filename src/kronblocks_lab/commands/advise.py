"""The subcommand `advise`: progress while it measures, tables, and JSON."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kronblocks.advice.measuring import advise
from kronblocks.advice.report import Advice
from kronblocks.config.parts import BlockSettings
from kronblocks.config.sparsity import Frozen
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_json
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
    Console(soft_wrap=True, highlight=False).print(str(_advise(config)), markup=False)


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
