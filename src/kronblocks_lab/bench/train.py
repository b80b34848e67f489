"""`kronblocks bench train`: whole trainings on the clock, dense and sparse methods, each in a process of its own."""

from __future__ import annotations

import shutil
import statistics

from rich.console import Console
from rich.table import Table

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import read_json
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.settings import TrainSettings
from kronblocks_lab.data.sets import load_data
from kronblocks_lab.training.apart import train_apart
from kronblocks_lab.training.settings import DataName, TrainConfig

MEASURED = (
    *("train_seconds", "peak_memory_bytes", "test_accuracy", "validation_accuracy", "block_sparsity"),
    *("training_macs", "trainable_parameters_max", "trainable_parameters_end"),
)
COLUMNS = ("method", "seed", *MEASURED)
KEY = ("method", "seed")


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
    console, trainings = Console(stderr=True), settings.trainings(data)
    for number, config in enumerate(trainings, 1):
        if results.missing([{"method": config.method, "seed": config.seed}]):
            console.print(f"[{number}/{len(trainings)}] {config.out.name}", markup=False, highlight=False)
            results.add([_train(config, fresh=settings.fresh)])
    return results
