"""`kronblocks bench deploy`: a whole MLP as `export` ships it, beside the dense one and PyTorch's int8 form of that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from kronblocks.core.blocks import BlockGrid, BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.deploy.exported import Exported
from kronblocks.deploy.exporting import export
from kronblocks.surgery.sparsify import densify_
from kronblocks_lab.bench.cases.models import CLASSES
from kronblocks_lab.bench.cases.ways import dynamic_int8, random_mask, values_layer
from kronblocks_lab.bench.measure.machine import begin, told
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import measure
from kronblocks_lab.bench.settings import TimedSettings

COLUMNS = ("rows", "case", "forms", "bytes", "error", "ms", "ms_low", "ms_high", "speed", "speed_low", "speed_high")
KEY = ("rows", "case")
DENSE, INT8 = "dense", "dense, int8 (torch, dynamic)"
_TOLERANCE = 1e-4  # of the largest output, in fp32 against float64


@dataclass(frozen=True, kw_only=True)
class DeploySettings(TimedSettings):
    """Time a whole MLP as `export` ships it, beside the dense one and PyTorch's int8 form of that."""

    rows: tuple[int, ...] | None = None
    """Batch sizes; unset: 1 16 256 2048, and 256 with --quick."""
    width: int = 1024
    """Inputs, and size of the hidden layers."""
    layers: int = 3
    """Block-sparse layers; a dense one of 10 outputs follows."""
    blocks: tuple[int, ...] = (4, 16, 64)
    """Block sizes."""
    sparsity: float = 0.9

    kind = "deploy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu" or self.dtype != "fp32" or self.compiled:
            raise KronblocksError("bench deploy measures on a CPU in fp32: leave --device, --dtype and --compiled out")
        if min(self.batches, default=0) < 1 or self.layers < 1:
            raise KronblocksError("--rows and --layers are numbers from 1 on")
        if min(self.blocks, default=0) < 1 or any(self.width % block for block in self.blocks):
            raise KronblocksError(f"--blocks {self.blocks} must divide --width {self.width}")
        if not 0 <= self.sparsity < 1:
            raise KronblocksError(f"--sparsity is a share from 0 to below 1, not {self.sparsity}")

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes."""
        return self.rows if self.rows is not None else ((256,) if self.quick else (1, 16, 256, 2048))

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        own = {"width": self.width, "layers": self.layers, "blocks": list(self.blocks), "sparsity": self.sparsity}
        return {**super().shared(), **own}


def sparse_mlp(settings: DeploySettings, block: int) -> nn.Sequential:
    """Layers of live blocks at random places, ReLU between, and a dense last layer."""
    torch.manual_seed(block)
    width, generator = settings.width, torch.Generator().manual_seed(block)
    grid = BlockGrid(width, width, BlockSize(block, block))
    layers: list[nn.Module] = []
    for _ in range(settings.layers):
        layers += [values_layer(grid, random_mask(grid, 1 - settings.sparsity, generator), "cpu"), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES)).eval().requires_grad_(False)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values() if isinstance(tensor, Tensor))


def forms_of(exported: Exported) -> str:
    """How many layers have which form."""
    forms = [layer.form for layer in exported.layers]
    return ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@torch.inference_mode()
def measure_rows(settings: DeploySettings, rows: int, progress: Callable[[str], None]) -> list[Row]:
    """All models with one number of rows: checked against float64, then timed in turns."""
    x = torch.randn(rows, settings.width, generator=torch.Generator().manual_seed(rows))
    cases: dict[str, Callable[[], Tensor]] = {}
    found: dict[str, Row] = {}

    def add(name: str, model: nn.Module, forms: str, exact: Tensor, size: int, tolerance: float) -> None:
        error = _error(model(x), exact)
        if not error <= tolerance:
            raise KronblocksError(f"{name}: outputs are wrong by {error:.1e} of the largest: nothing was timed")
        found[name] = {"rows": rows, "case": name, "forms": forms, "bytes": size, "error": significant(error, 2)}
        cases[name] = lambda: model(x)

    for block in settings.blocks:
        progress(f"{rows:,} rows, blocks of {block}x{block}")
        model = sparse_mlp(settings, block)
        dense = copy.deepcopy(model)
        densify_(dense)
        exact = copy.deepcopy(dense).double()(x.double())
        if DENSE not in cases:
            add(DENSE, dense, "", exact, _bytes(dense), _TOLERANCE)
            quantised = dynamic_int8(dense)
            if quantised is not None:
                size = sum(p.numel() for p in dense.parameters())
                add(INT8, quantised, "", exact, size, 0.5)
        exported = export(model, x)
        name = f"exported, {settings.sparsity:.0%} zeros, {block}x{block}"
        add(name, exported.model, forms_of(exported), exact, _bytes(exported.model), _TOLERANCE)
        small = export(model, x, form="packed-int8")
        add(f"{name}, int8", small.model, forms_of(small), exact, _bytes(small.model), 0.5)
    progress(f"{rows:,} rows, timing")
    times = measure(cases, settings.budget, seed=rows)
    return [{**row, **times[name].row(times[DENSE])} for name, row in found.items()]


def summary(results: Results) -> Table:
    """All rows, for the screen."""
    table = Table(title=f"a whole model in inference: {results.path}", title_justify="left")
    for name in ("rows", "case", "layers", "KiB", "ms", "speed to dense", "repeats", "error"):
        table.add_column(name, justify="left" if name in ("case", "layers") else "right")
    for row in results.rows:
        spread = f"{row['speed_low']:.2f}-{row['speed_high']:.2f}"
        cells = [f"{row['rows']:,}", row["case"], row["forms"], f"{row['bytes'] / 1024:,.0f}", f"{row['ms']:.3f}"]
        table.add_row(*cells, f"{row['speed']:.2f}", spread, f"{row['error']:.0e}")
    return table


def run(settings: DeploySettings) -> Results:
    """Measure what is missing, and write it; a number of rows whose every case is there is done."""
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        for rows in settings.batches:
            if results.missing([{"rows": rows, "case": DENSE}]):
                results.add(measure_rows(settings, rows, show))
    return results
