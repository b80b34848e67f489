"""Accuracy of methods on one task, every method's learning rate tuned alike on validation, written as one JSON file.

    python benchmarks/accuracy.py --methods dense two-phase --blocks 4 16 --seeds 0 1 2

Each (method, block size, rate, seed) is a training in a process of its own under `--work`; what is done is not run again. The
rate of each (method, block size) is the one with the best mean validation accuracy; test accuracy is read for that rate only.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from kronblocks.experiments.compare import train_apart
from kronblocks.experiments.tasks import DataName, TrainConfig
from kronblocks.files import read_json, write_json
from kronblocks.methods import Method

KEPT = (
    "test_accuracy",
    "validation_accuracy",
    "block_sparsity",
    "live_blocks",
    "total_blocks",
    "trainable_parameters_start",
    "trainable_parameters_max",
    "trainable_parameters_end",
    "training_macs",
    "inference_macs_per_sample",
    "bytes",
    "train_seconds",
    "peak_memory_bytes",
)


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Which trainings there are, and where they are kept."""

    work: Path = Path("runs/accuracy")
    out: Path = Path("benchmarks/results/accuracy.json")
    data: DataName = "fashion-mnist"
    widths: tuple[int, ...] = (512, 256)
    methods: tuple[Method, ...] = ("dense", "two-phase", "kron-l1", "magnitude", "group-lasso")
    blocks: tuple[str, ...] = ("4", "16")
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 8
    sparsity: float = 0.9

    def runs(self, method: Method, block: str) -> list[TrainConfig]:
        """The trainings of one method at one block size."""
        return [
            TrainConfig(
                out=self.work / f"{method}-{block}-{rate:g}-s{seed}",
                data=self.data,
                widths=self.widths,
                method=method,
                block_size=block,
                sparsity=self.sparsity,
                epochs=self.epochs,
                lr=rate,
                seed=seed,
                resume=True,
                progress=False,
            )
            for rate, seed in itertools.product(self.rates, self.seeds)
        ]


def _result(run: TrainConfig) -> dict[str, Any]:
    path = run.out / "result.json"
    if not path.exists():
        train_apart(run)
    return read_json(path)


def _entry(campaign: Campaign, method: Method, block: str) -> dict[str, Any]:
    results = [_result(run) for run in campaign.runs(method, block)]
    by_rate = {rate: [r for r in results if r["config"]["lr"] == rate] for rate in campaign.rates}
    validation = {rate: statistics.mean(r["validation_accuracy"] for r in group) for rate, group in by_rate.items()}
    best = max(validation, key=lambda rate: validation[rate])
    chosen = by_rate[best]
    return {
        "method": method,
        "block_size": None if method == "dense" else block,
        "rate": best,
        "validation_accuracy_by_rate": {f"{rate:g}": value for rate, value in validation.items()},
        "runs": [{"seed": r["config"]["seed"], **{name: r[name] for name in KEPT}} for r in chosen],
        "config": chosen[0]["config"],
        "versions": chosen[0]["versions"],
    }


def main(campaign: Campaign) -> None:
    """Run what is missing and write the file after every finished (method, block size); other entries of the file stay."""
    known = read_json(campaign.out)["entries"] if campaign.out.exists() else []
    entries = {(entry["method"], entry["block_size"]): entry for entry in known}
    for method in campaign.methods:
        for block in campaign.blocks[:1] if method == "dense" else campaign.blocks:
            entry = _entry(campaign, method, block)
            entries[method, entry["block_size"]] = entry
            accuracies = [100 * r["test_accuracy"] for r in entry["runs"]]
            print(f"{method} {block}: {statistics.mean(accuracies):.2f} at rate {entry['rate']:g}", flush=True)
            write_json(campaign.out, {"version": 1, "sparsity": campaign.sparsity, "entries": list(entries.values())})


if __name__ == "__main__":
    main(tyro.cli(Campaign))
