"""The short table at the top of the benchmark page: each kind of measurement against dense."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kronblocks_lab.bench.cases.ways import BOTH, FORWARD
from kronblocks_lab.bench.page.tables import (
    Row,
    against_dense,
    count,
    find,
    limit_of,
    table,
)


def _ops_summary(rows: Sequence[Row]) -> list[list[str]]:
    lines = []
    for direction in (FORWARD, BOTH):
        for number in (256, 2048):
            for block in ("4x4", "16x16", "64x64"):
                place = {"shape": "1024x1024", "density": 0.1, "block": block, "rows": number, "direction": direction}
                for row in find(rows, case="values packed", **place):
                    name = f"packed, 90% zeros, {block}, 1024x1024, {number:,} rows, {direction}"
                    lines.append(against_dense(row, name, limit_of(row)))
    return lines


def _infer_summary(rows: Sequence[Row]) -> list[list[str]]:
    place = {"shape": "4096x4096", "density": 0.1, "block": "16x16", "rows": 1, "case": "values packed"}
    name = "packed, 90% zeros, 16x16, 4096x4096, one row, inference"
    return [against_dense(row, name) for row in find(rows, **place)]  # no limit: dense's weight does not fit into the caches


def _step_summary(rows: Sequence[Row], machine: str = "") -> list[list[str]]:
    lines = []
    for number in sorted({row["rows"] for row in rows}, reverse=True):
        here = find(rows, rows=number)
        for name in ("factors r=1 8x8", "factors r=4 16x16", "factors r=8 16x16 per-row", "packed 90% 16x16"):
            fixed = [r for r in here if r["case"] == name or (r["plan"] and r["case"] == f"{name} {r['plan']}")]
            if fixed:
                best = max(fixed, key=lambda row: row["speed"])
                default = " (the default)" if "r=8" in name else ""
                lines.append(against_dense(best, f"training step, {best['case']}{default}, {count(number, 'row')}{machine}"))
    return lines


def _machine(settings: dict[str, Any]) -> str:
    """Which other machine a file was measured on, behind what was measured."""
    return f", on {settings['label']}" if "label" in settings else ""


def _model_summary(data: dict[str, Any]) -> list[list[str]]:
    """A whole model, all that is not sparse included."""
    settings = data["settings"]
    about = f"{settings['model']}, batch {settings['batch_size']}{_machine(settings)}"
    return [against_dense(row, f"{about}, {row['direction']}: {row['case']}") for row in data["rows"] if row["case"] != "dense"]


def _deploy_summary(rows: Sequence[Row]) -> list[list[str]]:
    dense = {row["rows"]: row["ms"] for row in rows if row["case"] == "dense"}
    sparse = [row for row in rows if row["case"].startswith("exported") and row["rows"] == 256]
    return [against_dense({**row, "dense_ms": dense[256]}, f"whole model, {row['case']}, 256 rows") for row in sparse]


def _train_summary(rows: Sequence[Row]) -> list[list[str]]:
    dense, own = ({row["seed"]: row["train_seconds"] for row in find(rows, method=m)} for m in ("dense", "two-phase"))
    seeds = sorted(dense.keys() & own.keys())
    if not seeds:
        return []
    each = [dense[seed] / own[seed] for seed in seeds]
    middle = [1e3 * statistics.median(times[seed] for seed in seeds) for times in (own, dense)]
    row = {
        "ms": middle[0],
        "dense_ms": middle[1],
        "speed": middle[1] / middle[0],
        "speed_low": min(each),
        "speed_high": max(each),
    }
    return [against_dense(row, "whole training, two-phase")]


def summary_table(parts: dict[str, dict[str, Any]], variants: Sequence[dict[str, Any]]) -> list[str]:
    makers = {"step": _step_summary, "ops": _ops_summary, "infer": _infer_summary}
    makers |= {"deploy": _deploy_summary, "train": _train_summary}
    lines = [line for kind, make in makers.items() if kind in parts for line in make(parts[kind]["rows"])]
    for data in (data for data in variants if data["settings"]["device"] == "cpu"):
        if data["name"] == f"step-{data['settings'].get('label')}":  # the same on another machine
            lines += _step_summary(data["rows"], _machine(data["settings"]))
        elif data["kind"] == "model":
            lines += _model_summary(data)
    note = "The limit is what multiply-adds, or bytes at the speed of a plain copy, allow: given where one product is timed."
    return [*table(["what", "ms", "dense, ms", "ratio (of the repeats)", "limit"], lines), "", note] if lines else []
