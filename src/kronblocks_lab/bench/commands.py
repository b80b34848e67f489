"""The subcommands of `kronblocks bench`: they measure, write JSON, and show what was found."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console

from kronblocks_lab.bench.cases.grids import InferSettings, OpsSettings
from kronblocks_lab.bench.settings import DeploySettings, ModelSettings, StepSettings, TablesSettings, TrainSettings

Bench = (
    Annotated[OpsSettings, tyro.conf.subcommand("ops")]
    | Annotated[StepSettings, tyro.conf.subcommand("step")]
    | Annotated[InferSettings, tyro.conf.subcommand("infer")]
    | Annotated[DeploySettings, tyro.conf.subcommand("deploy")]
    | Annotated[ModelSettings, tyro.conf.subcommand("model")]
    | Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[TablesSettings, tyro.conf.subcommand("tables")]
)


def main(settings: tyro.conf.OmitSubcommandPrefixes[Annotated[Bench, tyro.conf.arg(name="")]]) -> None:
    """Measure speed and memory against dense, and write the page of the results."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # tables into a file or a log
    match settings:
        case OpsSettings():
            from kronblocks_lab.bench import ops

            results = ops.run(settings)
        case InferSettings():
            from kronblocks_lab.bench import infer

            results = infer.run(settings)
        case StepSettings():
            from kronblocks_lab.bench import step

            results = step.run(settings)
            console.print(step.summary(results))
        case DeploySettings():
            from kronblocks_lab.bench import deploy

            results = deploy.run(settings)
            console.print(deploy.summary(results))
        case ModelSettings():
            from kronblocks_lab.bench import whole_model

            results = whole_model.run(settings)
            console.print(whole_model.summary(results))
        case TrainSettings():
            from kronblocks_lab.bench import train

            results = train.run(settings)
            console.print(train.summary(results))
        case TablesSettings():
            from kronblocks_lab.bench.page import page

            written = page.write(settings.results, settings.page)
            console.print(f"page: {written}", soft_wrap=True, highlight=False)
            return
    console.print(f"results: {results.path}, {len(results.rows):,} rows", soft_wrap=True, highlight=False)
