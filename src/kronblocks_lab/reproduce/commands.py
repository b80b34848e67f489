"""The subcommand `kronblocks reproduce`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from kronblocks.config.methods import Method
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.training.model_settings import DataName, option
from kronblocks_lab.training.settings import part_of_a_file_name

if TYPE_CHECKING:
    from kronblocks_lab.reproduce.studies import Study

What = Literal[
    "mlp", "ablation", "linear", "lenet5", "decoder", "vit", "vit-tiny", "vit-base", "swin-tiny", "search", "all", "tables"
]
SHORT: dict[str, tuple[str, ...]] = {
    "mlp": ("mlp",),
    "ablation": ("ablation", "group-lasso-forms", "kron-l1-forms"),
    "linear": ("linear-mnist5k", "linear-fashion"),
    "lenet5": ("lenet5-mnist5k", "lenet5-fashion", "lenet5-fashion-finer"),
    "decoder": ("decoder", "decoder-one-rate"),
    "vit": ("vit-cifar100", "vit-tiny-cifar100-small"),
    "vit-tiny": ("vit-tiny-fashion", "vit-tiny-fashion-tuned", "vit-tiny-factor-rates"),
    "swin-tiny": ("swin-tiny-fashion", "swin-tiny-fashion-tuned", "swin-tiny-factor-rates"),
}
"""Studies that a few CPU cores can run."""

FULL: dict[str, tuple[str, ...]] = {name: (f"{name}-cifar100",) for name in ("vit-tiny", "vit-base", "swin-tiny")}
"""The paper's own, which want a GPU."""

_ONES = ("data", "data_file", "data_label", "epochs", "steps", "lr")
LISTS = ("methods", "block_sizes", "sparsities", "seeds")
"""Settings of a study of one's own that hold several values."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Run the experiments behind the tables of the docs: every method tuned alike on validation, then compared on test data.

    What is done is not run again: an interrupted command goes on where it was.
    """

    what: tyro.conf.Positional[What]
    """The study: a model of the paper, the MLP, a language model (decoder), a ViT on small images (vit), settings of the default
    method and forms of penalties (ablation), the block-size search (search), or all of them. tables: write the page."""
    out: Path = Path("benchmarks/results")
    """Folder of the results files."""
    page: Path = Path("docs/experiments.md")
    """The page that `tables` writes."""
    work: Path = Path("runs/reproduce")
    """Folder of the trainings."""
    full: bool = False
    """The transformers as in the paper, on CIFAR-100 with images of 224 pixels, each method at its own rate: wants a GPU."""
    jobs: int | None = None
    """Trainings at a time; unset: two, of one thread each, and one with --full."""
    data: DataName | None = None
    """Another data set; this and the next ones make a study of your own, with --name."""
    data_file: Path | None = None
    """Another text for the decoder."""
    data_label: str | None = None
    """What the data is where it is not the original, such as "JPEG copies"; stands beside the numbers."""
    data_dir: Path | None = None
    """Folder with the data set's files."""
    methods: tuple[Method, ...] | None = None
    """Those to compare; dense, which all are compared with, is added automatically."""
    block_sizes: tuple[str, ...] | None = None
    """Block sizes, such as 4 16x4, each at every one of --sparsities; where a size does not divide a layer, the nearest does."""
    sparsities: tuple[float, ...] | None = None
    """Shares of the weights that end in zero blocks; methods are tuned at the first."""
    seeds: tuple[int, ...] | None = None
    """Of the compared trainings; methods are tuned with others."""
    epochs: int | None = None
    """Of every training; of the decoder: how often it is validated."""
    steps: int | None = None
    """Of every training of the decoder."""
    lr: float | None = None
    """Learning rate of all methods, which then are not tuned."""
    name: str | None = None
    """Of the study of your own: its results go to reproduce-NAME.json."""

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise KronblocksError(f"--jobs must be at least 1, not {self.jobs}")
        groups = FULL if self.full else SHORT
        if self.what not in (*groups, "all", "tables", *(() if self.full else ("search",))):
            raise KronblocksError(
                f"{self.what} {'has no other form: leave --full out' if self.full else 'is too large for a CPU: add --full'}"
            )

        for name in LISTS:
            if getattr(self, name) == ():
                raise KronblocksError(f"{option(name)} names nothing: write at least one after it, or leave it out")
        if self.name is not None:
            part_of_a_file_name("--name", self.name)
        own = ", ".join(self.own)
        if own and self.what in ("ablation", "search", "all", "tables"):
            raise KronblocksError(f"{own}: name a model, not {self.what}")
        if own and self.name is None:
            raise KronblocksError(f"{own}: that makes a study of your own, so add --name")
        if self.name is not None and not own:
            raise KronblocksError(
                f"--name is for a study of your own: say what is other than in kronblocks reproduce {self.what}"
            )

    @property
    def own(self) -> list[str]:
        """What the user set of a study of one's own."""
        names = (*_ONES, *LISTS)
        return [option(name) for name in names if getattr(self, name) is not None]

    def studies(self) -> list[Study]:
        """What to run.

        Raises:
            KronblocksError: a training of it cannot be.
        """
        from kronblocks_lab.reproduce.studies import STUDIES, own_study

        if self.name is None:
            return [dataclasses.replace(STUDIES[name], data_dir=self.data_dir) for name in self.names]
        values = {name: getattr(self, name) for name in (*_ONES, "methods", "seeds", "data_dir")}
        changes = {name: value for name, value in values.items() if value is not None}
        tuned = [name for name in self.names if STUDIES[name].lr is None]  # rather than one that is too short for that
        return [own_study(STUDIES[(tuned or self.names)[0]], self.name, self.block_sizes, self.sparsities, **changes)]

    @property
    def names(self) -> tuple[str, ...]:
        """The studies."""
        groups = {"search": (), **(FULL if self.full else SHORT)}
        return groups[self.what] if self.what != "all" else tuple(name for group in groups.values() for name in group)


def main(config: Annotated[ReproduceConfig, tyro.conf.arg(name="")]) -> None:
    """Run the experiments behind the tables of the docs."""
    from kronblocks_lab.reproduce.campaign import Campaign

    if config.what == "tables":
        from kronblocks_lab.reproduce.page.page import write

        Console().print(f"page: {write(config.out, config.page).resolve()}", soft_wrap=True, highlight=False)
        return
    for study in config.studies():
        results = Campaign(study, config.out, config.work, config.jobs or (1 if config.full else 2)).run()
        Console().print(_summary(study, results.rows))
        Console().print(f"results: {results.path}", soft_wrap=True, highlight=False)
    if config.what in ("search", "all") and not config.full:
        from kronblocks_lab.reproduce.searches import SEARCHES

        results = SEARCHES.run(config.out, config.work)
        Console().print(f"results: {results.path}", soft_wrap=True, highlight=False)


def _summary(study: Study, rows: list[dict]) -> Table:
    """What a study found, for the screen: of variants the validation accuracy, which they are judged by."""
    from kronblocks_lab.reproduce.statistics import cells

    table = Table(title=study.name, title_justify="left")
    names = (
        "method",
        "block",
        "sparsity %",
        study.measure.title.lower(),
        "to dense",
        "training multiply-adds, to dense",
        "sizes in the layers",
    )
    if study.variants is not None:
        names = ("changed", "block", "sparsity %", f"validation {study.measure.name}, {study.measure.unit}")
    for name in names:
        table.add_column(name, justify="left" if name in names[:1] else "right")
    variants = list(study.variants or ())
    for cell in cells(rows, study.measure):
        if variants:
            table.add_row(variants[cell.trial], *cell.summary("validation")[1:4])
        else:
            table.add_row(*cell.summary(), cell.rows[0]["blocks"])
    return table
