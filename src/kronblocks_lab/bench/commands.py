"""The subcommands of `kronblocks bench`: they measure, write JSON, and show the results."""

from __future__ import annotations

from typing import Annotated

import tyro
from rich.console import Console

from kronblocks_lab.bench import account, convolutions, deploy, exports, infer, ops, precision, short, step, train, whole_model
from kronblocks_lab.bench.account import AccountSettings
from kronblocks_lab.bench.cases.grids import InferSettings, OpsSettings
from kronblocks_lab.bench.convolutions import ConvSettings
from kronblocks_lab.bench.deploy import DeploySettings
from kronblocks_lab.bench.exports import ExportsSettings
from kronblocks_lab.bench.precision import PrecisionSettings
from kronblocks_lab.bench.settings import StepSettings, TablesSettings
from kronblocks_lab.bench.short import ShortSettings
from kronblocks_lab.bench.train import TrainSettings
from kronblocks_lab.bench.whole_model import ModelSettings

Bench = (
    Annotated[OpsSettings, tyro.conf.subcommand("ops")]
    | Annotated[StepSettings, tyro.conf.subcommand("step")]
    | Annotated[InferSettings, tyro.conf.subcommand("infer")]
    | Annotated[PrecisionSettings, tyro.conf.subcommand("precision")]
    | Annotated[ConvSettings, tyro.conf.subcommand("conv")]
    | Annotated[DeploySettings, tyro.conf.subcommand("deploy")]
    | Annotated[ExportsSettings, tyro.conf.subcommand("exports")]
    | Annotated[ModelSettings, tyro.conf.subcommand("model")]
    | Annotated[AccountSettings, tyro.conf.subcommand("account")]
    | Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[ShortSettings, tyro.conf.subcommand("short")]
    | Annotated[TablesSettings, tyro.conf.subcommand("tables")]
)


def main(settings: tyro.conf.OmitSubcommandPrefixes[Annotated[Bench, tyro.conf.arg(name="")]]) -> None:
    """Measure speed and memory against dense, and write the page of the results."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # tables into a file or a log
    table, failed = None, []
    match settings:
        case OpsSettings():
            results = ops.run(settings)
        case InferSettings():
            results = infer.run(settings)
        case StepSettings():
            table = step.summary(results := step.run(settings))
        case PrecisionSettings():
            table = precision.summary(results := precision.run(settings))
        case ConvSettings():
            table = convolutions.summary(results := convolutions.run(settings))
        case DeploySettings():
            table = deploy.summary(results := deploy.run(settings))
        case ExportsSettings():
            table = exports.summary(results := exports.run(settings))
        case ModelSettings():
            table = whole_model.summary(results := whole_model.run(settings))
        case AccountSettings():
            table = account.summary(results := account.run(settings))
        case TrainSettings():
            table = train.summary(results := train.run(settings))
        case ShortSettings():
            table = short.summary(results := short.run(settings))
            failed = short.problems(results.head)
        case TablesSettings():
            from kronblocks_lab.bench.page import page  # matplotlib draws its figures

            console.print(f"page: {page.write(settings.results, settings.page)}", soft_wrap=True, highlight=False)
            return
    if table is not None:
        console.print(table)
    console.print(f"results: {results.path}, {len(results.rows):,} rows", soft_wrap=True, highlight=False)
    for line in failed:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if failed:
        raise SystemExit(1)
