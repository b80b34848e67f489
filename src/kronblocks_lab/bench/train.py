"""`kronblocks bench train`: whole trainings on the clock, dense and sparse methods, each in a process of its own."""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kronblocks.config.methods import METHODS, Method
from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks_lab.bench.measure.machine import kind_of
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.settings import QUICK_RESULTS, BenchSettings
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.training.apart import train_apart
from kronblocks_lab.training.model_settings import DataName
from kronblocks_lab.training.settings import TrainConfig

MEASURED = (
    *("train_seconds", "peak_memory_bytes", "test_accuracy", "validation_accuracy", "block_sparsity"),
    *("training_macs", "trainable_parameters_max", "trainable_parameters_end"),
)
COLUMNS = ("method", "seed", *MEASURED)
KEY = ("method", "seed")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(BenchSettings):
    """Whole trainings on the clock: dense and sparse methods, the same epochs, in turns, each in a process of its own."""

    data: DataName | None = None
    """Data set; unset: Fashion-MNIST where it is installed, else 5,000 digits of MNIST, which are also what --quick takes."""
    widths: tuple[int, ...] = (1024, 1024)
    """Hidden sizes of the MLP."""
    block_size: str = "16"
    sparsity: float = 0.9
    epochs: int | None = None
    """Unset: 8, and 3 with --quick."""
    batch_size: int = 256
    seeds: tuple[int, ...] | None = None
    """Unset: 0 1 2, and 0 with --quick."""
    methods: tuple[Method, ...] | None = None
    """Beside dense; unset: all, and two-phase with --quick."""
    work: Path | None = None
    """Folder of the trainings, where finished ones are taken from unless --fresh; unset: runs/bench-train, and
    runs/bench-quick/train with --quick."""

    kind = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.all_seeds:
            raise KronblocksError("--seeds without a value leaves nothing to train: give at least one")
        self.trainings("mnist5k")

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """Each gives one training of each method."""
        return self.seeds if self.seeds is not None else ((0,) if self.quick else (0, 1, 2))

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """In the order of the first seed."""
        unset: tuple[Method, ...] = ("two-phase",) if self.quick else tuple(METHODS)
        return tuple(dict.fromkeys(("dense", *(unset if self.methods is None else self.methods))))

    def trainings(self, data: DataName) -> list[TrainConfig]:
        """What to train, in order: the methods take turns, and the one that begins alternates.

        Raises:
            KronblocksError: a setting that a training cannot have.
        """
        work = self.work or (QUICK_RESULTS / "train" if self.quick else Path("runs/bench-train"))
        epochs = self.epochs if self.epochs is not None else (3 if self.quick else 8)
        trainings = []
        for number, seed in enumerate(dict.fromkeys(self.all_seeds)):
            for method in self.all_methods if number % 2 == 0 else reversed(self.all_methods):
                trainings.append(
                    TrainConfig(
                        out=work / f"{data}-{method}-s{seed}",
                        data=data,
                        widths=self.widths,
                        method=method,
                        block_size=self.block_size,
                        sparsity=self.sparsity,
                        epochs=epochs,
                        batch_size=self.batch_size,
                        seed=seed,
                        threads=self.threads,
                        resume=True,
                        progress=False,
                    )
                )
        return trainings

    def shared(self, data: DataName) -> dict[str, Any]:
        """What all rows of a file have in common."""
        config = self.trainings(data)[0].settings()
        names = ("data", "widths", "block_size", "sparsity", "epochs", "batch_size", "threads")
        label = {"label": self.label} if self.label else {}
        return {**{name: config[name] for name in names}, "quick": self.quick, **label}


def _data(settings: TrainSettings) -> DataName:
    """The data set asked for, or the largest that is here."""
    if settings.data is not None or settings.quick:
        return settings.data or "mnist5k"
    try:
        load_data("fashion-mnist", download=False)
    except KronblocksError:
        return "mnist5k"
    return "fashion-mnist"


def _train(config: TrainConfig, *, fresh: bool) -> Row:
    """One training, or what is left of it; its result."""
    if fresh and (config.out / "config.json").exists():
        shutil.rmtree(config.out)
    train_apart(config)
    result = read_json(config.out / "result.json")
    return {"method": config.method, "seed": config.seed, **{name: significant(result[name], 6) for name in MEASURED}}


def summary(results: Results) -> Table:
    """All methods, for the screen."""
    table = Table(title=f"whole trainings: {results.path}", title_justify="left")
    for name in ("method", "seeds", "seconds", "accuracy %", "peak MiB"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in dict.fromkeys(row["method"] for row in results.rows):
        rows = [row for row in results.rows if row["method"] == method]
        middle = {name: statistics.median(row[name] for row in rows) for name in MEASURED}
        cells = [f"{middle['train_seconds']:.1f}", f"{100 * middle['test_accuracy']:.2f}"]
        table.add_row(method, str(len(rows)), *cells, f"{middle['peak_memory_bytes'] / 2**20:.0f}")
    return table


def run(settings: TrainSettings) -> Results:
    """Train what is missing, and write it."""
    data = _data(settings)
    results = Results.open(settings.path, settings.kind, COLUMNS, KEY, settings.shared(data), fresh=settings.fresh)
    if not results.rows:
        results.head["machine"] = kind_of("cpu")
    console, trainings = Console(stderr=True), settings.trainings(data)
    for number, config in enumerate(trainings, 1):
        if results.missing([{"method": config.method, "seed": config.seed}]):
            console.print(f"[{number}/{len(trainings)}] {config.out.name}", markup=False, highlight=False)
            results.add([_train(config, fresh=settings.fresh)])
    return results
