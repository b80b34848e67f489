"""The short table at the top of the benchmark page: ratios to dense, one column for each kind of machine, the lowest first."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kronblocks_lab.bench.cases.ways import BOTH, DENSE, FORWARD
from kronblocks_lab.bench.convolutions import BLOCKS, ConvShape
from kronblocks_lab.bench.deploy import INT8
from kronblocks_lab.bench.page.machines import machine_of
from kronblocks_lab.bench.page.tables import Row, count, find, limit_of, ratio, table
from kronblocks_lab.bench.precision import PACKED

FP32 = "dense fp32"


class Entry(NamedTuple):
    """One measured ratio."""

    what: str
    beside: str
    speed: float
    limit: str = ""


def _ops(rows: Sequence[Row]) -> Iterator[Entry]:
    for direction in (FORWARD, BOTH):
        for number in (256, 2048):
            for block in ("4x4", "16x16", "64x64"):
                place = {"shape": "1024x1024", "density": 0.1, "block": block, "rows": number, "direction": direction}
                for row in find(rows, case="values packed", **place):
                    name = f"packed, 90% zeros, {block}, 1024x1024, {number:,} rows, {direction}"
                    yield Entry(name, FP32, row["speed"], limit_of(row))


def _infer(rows: Sequence[Row]) -> Iterator[Entry]:
    place = {"shape": "4096x4096", "density": 0.1, "block": "16x16", "rows": 1, "case": "values packed"}
    for row in find(rows, **place):  # no limit: dense's weight does not fit into the caches
        yield Entry("packed, 90% zeros, 16x16, 4096x4096, one row, inference", FP32, row["speed"])


def _step(rows: Sequence[Row]) -> Iterator[Entry]:
    for number in sorted({row["rows"] for row in rows}, reverse=True):
        here = find(rows, rows=number)
        for name in ("factors r=1 8x8", "factors r=4 16x16", "factors r=8 16x16 per-row", "packed 90% 16x16"):
            fixed = [r["speed"] for r in here if r["case"] == name or (r["plan"] and r["case"] == f"{name} {r['plan']}")]
            if fixed:
                default = " (the default)" if "r=8" in name else ""
                yield Entry(f"training step, {name}{default}, {count(number, 'row')}", FP32, max(fixed))


def _precision(rows: Sequence[Row], settings: dict[str, Any]) -> Iterator[Entry]:
    zeros = f"{100 * (1 - settings['density']):g}% zeros"
    for row in find(rows, shape="1024x1024", block="16x16", case=PACKED):
        if row["precision"] != "fp32":
            name = f"packed {row['precision']}, {zeros}, 16x16, 1024x1024, {count(row['rows'], 'row')}, {row['direction']}"
            yield Entry(name, f"dense {row['precision']}", row["speed"])


def _conv(rows: Sequence[Row]) -> Iterator[Entry]:
    for row in find(rows, density=0.1, case=BLOCKS):
        yield Entry(f"convolution, 90% zeros, {ConvShape.parse(row['shape'])}, {row['direction']}", FP32, row["speed"])


def _model(rows: Sequence[Row], settings: dict[str, Any]) -> Iterator[Entry]:
    """A whole model, all that is not sparse included."""
    for row in rows:
        if row["case"] != DENSE:
            about = f"{settings['model']}, batch {settings['batch_size']}, {row['direction']}: {row['case']}"
            yield Entry(about, FP32, row["speed"])


def _deploy(rows: Sequence[Row]) -> Iterator[Entry]:
    here = find(rows, rows=256)
    for row in here:
        if row["case"].startswith("exported"):
            yield Entry(f"whole model, {row['case']}, 256 rows", FP32, row["speed"])
            for dense in find(here, case=INT8) if row["case"].endswith("int8") else []:
                yield Entry(f"whole model, {row['case']}, 256 rows", "dense int8", dense["ms"] / row["ms"])


def _train(rows: Sequence[Row]) -> Iterator[Entry]:
    dense, own = ({row["seed"]: row["train_seconds"] for row in find(rows, method=m)} for m in ("dense", "two-phase"))
    seeds = sorted(dense.keys() & own.keys())
    if seeds:
        middle = [statistics.median(times[seed] for seed in seeds) for times in (dense, own)]
        yield Entry("whole training, two-phase", FP32, middle[0] / middle[1])


_OF_KIND = {
    "step": _step,
    "ops": _ops,
    "infer": _infer,
    "conv": _conv,
    "deploy": _deploy,
    "train": _train,
}
_WITH_SETTINGS = {"model": _model, "precision": _precision}


def entries(data: dict[str, Any]) -> list[Entry]:
    """What a file says to the summary: nothing where it is not the plain benchmark in fp32 on a CPU."""
    settings, kind = data["settings"], data["kind"]
    plain = settings.get("device", "cpu") == "cpu" and settings.get("dtype", "float32") == "float32"
    if not plain or settings.get("authors") or settings.get("ranks") not in (None, [1, 4]):
        return []
    if kind in _WITH_SETTINGS:
        return list(_WITH_SETTINGS[kind](data["rows"], settings))
    return list(_OF_KIND[kind](data["rows"])) if kind in _OF_KIND else []


def summary_table(files: Sequence[dict[str, Any]]) -> list[str]:
    """All ratios, one line for each thing measured; a machine kind measured twice has its lowest and highest."""
    found: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for data in files:
        for entry in entries(data):
            found.setdefault((entry.what, entry.beside), {}).setdefault(machine_of(data), []).append(entry)
    machines = sorted({machine for measured in found.values() for machine in measured})
    lines = []
    for (what, beside), measured in found.items():
        least = min((entry for each in measured.values() for entry in each), key=lambda entry: entry.speed)
        lowest = f"**{ratio(least.speed)}**" if least.speed >= 1 else ratio(least.speed)
        lines.append([what, beside, lowest, *(_cell(measured.get(machine, [])) for machine in machines), least.limit])
    note = (
        "The limit is what multiply-adds, or bytes at the speed of a plain copy, allow: given where one product is timed. "
        "A machine's column has two numbers where two machines of that kind were measured."
    )
    return [*table(["what", "beside", "lowest", *machines, "limit"], lines, left=2), "", note] if lines else []


def _cell(measured: Sequence[Entry]) -> str:
    speeds = sorted({ratio(entry.speed) for entry in measured}, key=float)
    return " to ".join(dict.fromkeys((*speeds[:1], *speeds[-1:])))
