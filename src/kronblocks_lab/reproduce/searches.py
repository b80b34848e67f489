"""Whether the block-size search finds what training every size apart would have found, and for how much less time."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.page.tables import table
from kronblocks_lab.training.settings import TrainConfig

NAME = "search"
KEY = ("part", "task", "size", "seed")
COLUMNS = (*KEY, "found", "test_accuracy", "block_sparsity", "seconds", "steps", "blocks")
REVISION = 2
"""Of how searches decide; raise it when that changes: what an earlier one found is not what is found now."""

SEARCHES_BY = {"search": "halving", "removal": "removal", "penalty": "the paper's penalty"}
"""Parts of the results to how their searches judge candidates."""

SIZES = ("2", "4", "8", "16", "32")
SEEDS = tuple(range(10))

TASKS: dict[str, dict[str, Any]] = {
    "MLP, Fashion-MNIST, 90%": {"data": "fashion-mnist", "model": "mlp", "widths": (512, 256), "epochs": 8, "sparsity": 0.9},
    "MLP, MNIST-5k, 80%": {
        **{"data": "mnist5k", "model": "mlp", "widths": (512, 256), "epochs": 20, "batch_size": 64, "sparsity": 0.8},
    },
    "linear, MNIST-5k, 90%": {"data": "mnist5k", "model": "linear", "epochs": 20, "batch_size": 64, "sparsity": 0.9},
}


@dataclass(frozen=True)
class SearchStudy:
    """Every size trained apart with several seeds, and as many searches of each kind, one after the other on an idle machine.

    Args:
        tasks: settings of their trainings, by name.
        sizes: the candidates.
        seeds: of trainings and searches.
        threads: of all of them; None: torch's own choice.
    """

    tasks: dict[str, dict[str, Any]]
    sizes: tuple[str, ...] = SIZES
    seeds: tuple[int, ...] = SEEDS
    threads: int | None = None

    def run(self, out: Path, work: Path) -> Results:
        """Run what is missing; returns the results."""
        shared = {"tasks": {name: _plain(task) for name, task in self.tasks.items()}, "sizes": list(self.sizes)}
        settings = {**shared, "threads": self.threads, "revision": REVISION}
        results = Results.open(out / f"{NAME}.json", NAME, COLUMNS, KEY, settings)
        missing = results.missing(self._keys())
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("search", total=len(missing))
            for key in missing:
                progress.update(bar, description=" ".join(str(value) for value in key.values()))
                results.add([{**key, **(self._apart(key, work) if key["part"] == "apart" else self._search(key))}])
                progress.advance(bar)
        return results

    def _keys(self) -> Iterator[Row]:
        for task in self.tasks:
            for seed in self.seeds:
                yield from ({"part": "apart", "task": task, "size": size, "seed": seed} for size in self.sizes)
                yield from ({"part": part, "task": task, "size": "auto", "seed": seed} for part in SEARCHES_BY)

    def _config(self, key: Row, out: Path) -> TrainConfig:
        shared = {"method": "two-phase", "resume": True, "progress": False, "threads": self.threads, "seed": key["seed"]}
        return TrainConfig(out=out, block_size=key["size"], **self.tasks[key["task"]], **shared)

    def _apart(self, key: Row, work: Path) -> Row:
        from kronblocks_lab.training.train import train

        folder = "-".join(str(value) for value in key.values()).replace(", ", "-").replace(" ", "-").replace("%", "")
        result = train(self._config(key, work / NAME / folder))
        return {
            "found": None,
            **{name: result[name] for name in ("test_accuracy", "block_sparsity")},
            "seconds": significant(result["train_seconds"]),
            "steps": None,
            "blocks": " ".join(sorted({layer["block_size"] for layer in result["layers"]})),
        }

    def _search(self, key: Row) -> Row:
        from kronblocks.search.config import MixtureConfig
        from kronblocks_lab.training.searching import search_for
        from kronblocks_lab.training.tasks import task_of

        config = dataclasses.replace(self._config(key, Path()), candidates=self.sizes)
        mixtures = {
            "removal": MixtureConfig(criterion="removal", seed=config.seed),
            "penalty": MixtureConfig(criterion="penalty", weights="equal", seed=config.seed),
        }
        found = search_for(config, task_of(config), mixtures.get(key["part"]))
        blocks = " ".join(sorted(set(found.chosen.values())))
        return {"found": str(found.winner), "seconds": significant(found.seconds), "steps": found.steps, "blocks": blocks}


SEARCHES = SearchStudy(TASKS)


def _plain(task: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in task.items()}


def page(data: dict[str, Any]) -> list[str]:
    """The tables of the experiments' page."""
    versions = data["versions"]
    lines = [f"{versions['processor']}, torch {versions['torch']}.", ""]
    for task in dict.fromkeys(row["task"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["task"] == task]
        lines += [
            f"### {task}",
            "",
            *_task(
                [row for row in rows if row["part"] == "apart"],
                {how: found for part, how in SEARCHES_BY.items() if (found := [row for row in rows if row["part"] == part])},
            ),
        ]
    return lines


def _task(apart: Sequence[Row], searches: Mapping[str, Sequence[Row]]) -> list[str]:
    groups: dict[str, list[Row]] = {}
    for row in apart:
        groups.setdefault(row["size"], []).append(row)
    best = max(groups, key=lambda size: _accuracy(groups[size]))
    below = {size: _accuracy(groups[best]) - _accuracy(rows) for size, rows in groups.items()}
    pooled, own = _pooled_deviation(groups.values()), _pooled_deviation([groups[best]])
    seconds = {size: statistics.median(row["seconds"] for row in rows) for size, rows in groups.items()}

    def cheapest(deviation: float) -> str:
        return min((size for size in groups if below[size] <= deviation), key=seconds.__getitem__)

    wanted, stricter = cheapest(pooled), cheapest(own)
    body = []
    for size, rows in groups.items():
        accuracies = [100 * row["test_accuracy"] for row in rows]
        deviation = f" ± {statistics.stdev(accuracies):.2f}" if len(rows) > 1 else ""
        body.append([f"**{size}x{size}**" if size == wanted else f"{size}x{size}", rows[0]["blocks"]])
        body[-1] += [f"{statistics.fmean(accuracies):.2f}{deviation}", f"{-100 * below[size]:+.2f}" if below[size] else ""]
        body[-1] += ["yes" if below[size] <= pooled else "no", f"{seconds[size]:.1f}"]
        for those in searches.values():
            body[-1].append(f"{sum(row['found'].split('x')[0] == size for row in those)} of {len(those)}")
    columns = ["block size", "in the layers", "test accuracy %", "to the best", "as good as the best", "seconds"]
    lines = [*table([*columns, *(f"found by {how}" for how in searches)], body, left=2), ""]
    if own > 0:
        found = f"{stricter}x{stricter}{' too' if stricter == wanted else ''}"
        by_own = f"by that of {best}x{best} alone, {100 * own:.2f}, the size to find would be {found}."
        lines += [f"The pooled deviation is {100 * pooled:.2f}; {by_own}", ""]
    took = {how: statistics.median(row["seconds"] for row in found) for how, found in searches.items()}
    if took:
        times = ", ".join(f"{each:.1f} s by {how}" for how, each in took.items())
        shares = ", ".join(f"{each / seconds[wanted]:.2f}" for each in took.values())
        lines += [f"A search took {times}: {shares} of a training with {wanted}x{wanted} blocks.", ""]
    return lines


def _pooled_deviation(groups: Iterable[Sequence[Row]]) -> float:
    """Of the test accuracy between seeds, from all sizes together: five seeds say little about one."""
    variances = [statistics.variance(row["test_accuracy"] for row in rows) for rows in groups if len(rows) > 1]
    return math.sqrt(statistics.fmean(variances)) if variances else 0.0


def _accuracy(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["test_accuracy"] for row in rows)
