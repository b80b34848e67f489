"""Which trainings a study consists of: data, model, methods, block sizes, sparsities, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronblocks.config import Method
from kronblocks.experiments.models import ModelName
from kronblocks.experiments.reproduce.trials import Settings, describe, trials
from kronblocks.experiments.tasks import DataName, TrainConfig

METHODS: tuple[Method, ...] = (
    *("dense", "two-phase", "kron-l1", "group-lasso", "elastic-group-lasso", "rigl", "iterative", "magnitude", "static"),
)


@dataclass(frozen=True)
class Cell:
    """A place in a study's table."""

    method: Method
    block: str  # "" for dense
    sparsity: float  # 0 for dense


@dataclass(frozen=True, kw_only=True)
class Study:
    """Methods on one task.

    Args:
        name: of the results file.
        data: data set.
        model: model.
        widths: hidden sizes of the MLP.
        epochs: of every training.
        batch_size: images a step.
        methods: those compared; dense has one cell whatever the blocks.
        cells: (block size, sparsity) pairs.
        tuned_at: sparsity at which every method is tuned, for each block size of its own.
        seeds: of the trainings that are compared: the same for all methods, so that differences are paired.
        tuning_seeds: of the trials, others than those.
    """

    name: str
    data: DataName
    model: ModelName = "mlp"
    widths: tuple[int, ...] = (512, 256)
    epochs: int = 8
    batch_size: int = 256
    methods: tuple[Method, ...] = METHODS
    cells: tuple[tuple[str, float], ...]
    tuned_at: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101)

    def table(self) -> list[Cell]:
        """All cells, dense first."""
        dense = [Cell("dense", "", 0.0)] * ("dense" in self.methods)
        others: list[Method] = [method for method in self.methods if method != "dense"]
        return dense + [Cell(method, block, sparsity) for block, sparsity in self.cells for method in others]

    def tuned(self) -> list[Cell]:
        """Where methods are tuned: once for each block size, at one sparsity."""
        blocks = dict.fromkeys(block for block, _ in self.cells)
        dense = [Cell("dense", "", 0.0)] * ("dense" in self.methods)
        return dense + [Cell(method, block, self.tuned_at) for block in blocks for method in self.methods if method != "dense"]

    def training(self, cell: Cell, settings: Settings, seed: int, out: Path) -> TrainConfig:
        """One training. Plans are chosen by counts, so that accuracies do not hang on timings."""
        sparse: dict[str, Any] = {} if cell.method == "dense" else {"block_size": cell.block, "sparsity": cell.sparsity}
        return TrainConfig(
            out=out,
            data=self.data,
            model=self.model,
            widths=self.widths if self.model == "mlp" else TrainConfig.widths,
            epochs=self.epochs,
            batch_size=self.batch_size,
            method=cell.method,
            seed=seed,
            resume=True,
            progress=False,
            measure_plans=False,
            threads=1,
            **sparse,
            **settings,
        )

    def shared(self) -> dict[str, Any]:
        """What all rows of the results have in common, as plain values."""
        names = ("data", "model", "epochs", "batch_size", "tuned_at")
        return {
            **{name: getattr(self, name) for name in names},
            "widths": list(self.widths) if self.model == "mlp" else [],
            "threads": 1,
            "trials": {method: [describe(each) for each in trials(method)] for method in self.methods},
        }


STUDIES = {
    study.name: study
    for study in (
        Study(
            name="mlp",
            data="fashion-mnist",
            cells=(
                *((block, 0.9) for block in ("2", "4", "8", "16")),
                *((block, sparsity) for sparsity in (0.5, 0.8, 0.95) for block in ("4", "16")),
            ),
        ),
        Study(name="linear-mnist5k", data="mnist5k", model="linear", epochs=20, cells=(("4", 0.5), ("4", 0.9))),
        Study(name="linear-fashion", data="fashion-mnist", model="linear", epochs=8, cells=(("4", 0.5), ("4", 0.9))),
        Study(name="lenet5-mnist5k", data="mnist5k", model="lenet5", epochs=20, cells=(("4", 0.5), ("4", 0.9))),
        Study(name="lenet5-fashion", data="fashion-mnist", model="lenet5", epochs=8, cells=(("4", 0.5), ("4", 0.9))),
    )
}
