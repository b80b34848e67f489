"""`kronblocks bench precision`: packed layers in fp32, bf16 and int8, each beside dense in the same precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import nn

from kronblocks.core.blocks import BlockSize
from kronblocks.core.errors import KronblocksError
from kronblocks.nn.quantized_block_linear import QuantizedBlockLinear
from kronblocks_lab.bench.cases.grid import Operands
from kronblocks_lab.bench.cases.grids import Group, parse_shape
from kronblocks_lab.bench.cases.ways import (
    BOTH,
    DENSE,
    FORWARD,
    Case,
    dense_case,
    dynamic_int8,
    layer_case,
    random_mask,
    values_layer,
)
from kronblocks_lab.bench.measure.machine import begin, told
from kronblocks_lab.bench.measure.results import Results, Row, significant
from kronblocks_lab.bench.measure.timing import TIMES, Timing, measure
from kronblocks_lab.bench.settings import Precision, TimedSettings

COLUMNS = ("shape", "block", "rows", "direction", "precision", "case", *TIMES, "fp32_speed", "gflops")
KEY = ("shape", "block", "rows", "direction", "precision", "case")
PACKED, INT8 = "packed", "int8"
TRAINED: tuple[Precision, ...] = ("fp32", "bf16")
_INT8_ERROR = 0.05  # of the largest output: a number of x and of W is rounded by up to 1/254 of the largest in its row


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(TimedSettings):
    """Time one packed layer in fp32, bf16 and int8, each beside dense in the same precision."""

    shapes: tuple[str, ...] = ("1024x1024", "256x768", "2048x768")
    """Weights, out_features x in_features."""
    blocks: tuple[str, ...] = ("4", "16", "64")
    """Block sizes."""
    rows: tuple[int, ...] | None = None
    """Rows of the input; unset: 1 16 256 2048, and 256 with --quick."""
    density: float = 0.1
    """Share of live blocks."""

    kind = "precision"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu" or self.dtype != "fp32" or self.compiled:
            raise KronblocksError(
                "bench precision times fp32, bf16 and int8 on a CPU: leave --device, --dtype and --compiled out, or use bench ops"
            )
        if not self.shapes or not self.blocks or min(self.counts, default=0) < 1:
            raise KronblocksError("--shapes, --blocks and --rows are at least one each, rows from 1 on")
        if not 0 < self.density <= 1:
            raise KronblocksError(f"--density is a share of live blocks, above 0 and up to 1, not {self.density}")
        for shape in self.shapes:
            for block in self.blocks:
                _ = self.group(shape, block, 1).grid

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of the input."""
        return self.rows if self.rows is not None else ((256,) if self.quick else (1, 16, 256, 2048))

    def group(self, shape: str, block: str, rows: int) -> Group:
        """One layer and the rows of its input.

        Raises:
            KronblocksError: a shape or block size that cannot be read, or that do not fit together.
        """
        return Group(parse_shape(shape), BlockSize.parse(block), self.density, rows)

    def shared(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return {**super().shared(), "density": self.density}


class Place(NamedTuple):
    """Which layer: block "" is dense."""

    block: str
    precision: str

    @property
    def case(self) -> str:
        """Packed, or what it is compared with."""
        return PACKED if self.block else DENSE

    def __str__(self) -> str:
        return f"{self.case} {self.block} {self.precision}"


def _cases(settings: PrecisionSettings, shape: str, rows: int) -> dict[Place, Case]:
    """Dense in every precision that this torch has, and each block size in every precision."""
    found: dict[Place, Case] = {}
    grid = settings.group(shape, settings.blocks[0], rows).grid
    for precision in TRAINED:
        dtype = TimedSettings(dtype=precision).torch_dtype
        found[Place("", precision)] = dense_case(grid, rows, "cpu", dtype)
        for block in settings.blocks:
            own = settings.group(shape, block, rows).grid
            layer = values_layer(own, random_mask(own, settings.density, torch.Generator().manual_seed(0)), "cpu", dtype)
            found[Place(str(own.block), precision)] = layer_case("values", layer, "packed", rows)
    dense = found[Place("", "fp32")].source
    quantized = dynamic_int8(nn.Sequential(dense))
    if quantized is None:
        return found
    found[Place("", INT8)] = Case(DENSE, quantized, dense, rows * grid.weights, grid.weights)
    for block in settings.blocks:
        fp32 = found[Place(str(BlockSize.parse(block)), "fp32")]
        layer: Any = fp32.source
        small = QuantizedBlockLinear.from_packed(layer)
        found[Place(str(layer.grid.block), INT8)] = Case(PACKED, small, layer, fp32.macs, fp32.parameters)
    return found


def _check_int8(operands: Operands, cases: dict[Place, Case], exact: dict[Place, Case]) -> None:
    """Beside the same layers in fp32, which were checked.

    Raises:
        KronblocksError: outputs that rounding cannot explain.
    """
    for place, case in cases.items():
        y, wanted = (operands.call(each, FORWARD)() for each in (case, exact[Place(place.block, "fp32")]))
        error = float((y - wanted).abs().max() / wanted.abs().max())
        if not error <= _INT8_ERROR:
            raise KronblocksError(f"{place}: outputs are wrong by {error:.1e} of the largest: nothing was timed")


def measure_rows(settings: PrecisionSettings, shape: str, rows: int, progress: Callable[[str], None]) -> list[Row]:
    """All cases of a shape with one number of rows: checked, then timed in turns; from 16 rows on with backward too."""
    progress(f"{shape}, {rows:,} rows")
    cases = _cases(settings, shape, rows)
    group = settings.group(shape, settings.blocks[0], rows)
    operands = {p: Operands(group, TimedSettings(threads=settings.threads, dtype=p), inference=True) for p in TRAINED}
    for precision, own in operands.items():
        own.check([case for place, case in cases.items() if place.precision == precision], gradients=rows >= 16)
    int8 = {place: case for place, case in cases.items() if place.precision == INT8}
    _check_int8(operands["fp32"], int8, cases)
    found: list[Row] = []
    for direction in (FORWARD, BOTH) if rows >= 16 else (FORWARD,):
        wanted = {p: c for p, c in cases.items() if direction == FORWARD or p.precision != INT8}
        calls = {str(p): operands["bf16" if p.precision == "bf16" else "fp32"].call(c, direction) for p, c in wanted.items()}
        times = measure(calls, settings.budget, seed=rows)
        times_of = {place: times[str(place)] for place in wanted}
        found += [_row(shape, rows, direction, place, case, times_of) for place, case in wanted.items()]
    return found


def _row(shape: str, rows: int, direction: str, place: Place, case: Case, times: dict[Place, Timing]) -> Row:
    own, dense, fp32 = times[place], times[Place("", place.precision)], times[Place("", "fp32")]
    macs = case.macs + (case.backward_macs if direction == BOTH else 0)
    about = {"shape": shape, "block": place.block, "rows": rows, "direction": direction}
    about |= {"precision": place.precision, "case": place.case, **own.row(dense)}
    return {**about, "fp32_speed": significant(fp32.ms / own.ms), "gflops": significant(2 * macs / own.ms / 1e6)}


def summary(results: Results) -> Table:
    """All packed rows, for the screen."""
    table = Table(title=f"packed, beside dense in the same precision: {results.path}", title_justify="left")
    for name in ("shape", "block", "direction", "rows", "precision", "ms", "speed to dense", "repeats", "to dense fp32"):
        table.add_column(name, justify="left" if name in ("shape", "block", "direction", "precision") else "right")
    for row in results.rows:
        if row["case"] == PACKED:
            spread = f"{row['speed_low']:.2f}-{row['speed_high']:.2f}"
            place = [row["shape"], row["block"], row["direction"], f"{row['rows']:,}", row["precision"]]
            table.add_row(*place, f"{row['ms']:.3f}", f"{row['speed']:.2f}", spread, f"{row['fp32_speed']:.2f}")
    return table


def run(settings: PrecisionSettings) -> Results:
    """Measure what is missing, and write it; the rows of a shape with one number of rows are written all at once."""
    results = begin(settings, COLUMNS, KEY)
    with told() as show:
        for shape in settings.shapes:
            for rows in settings.counts:
                wanted = {"shape": shape, "rows": rows, "direction": FORWARD, "precision": "fp32", "case": PACKED}
                blocks = [{**wanted, "block": str(BlockSize.parse(block))} for block in settings.blocks]
                if results.missing(blocks):
                    results.add(measure_rows(settings, shape, rows, show))
    return results
