"""The page's part of `bench short`: what a GPU said about itself, and one shape of everything, for each card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.page.tables import ms, ratio, ratios_of, roof, spread, table


def short_part(folder: Path) -> list[str]:
    """All cards; nothing where none was measured."""
    return [line for path in sorted(folder.glob("bench-short-*.json")) for line in _card(read(path))]


def _card(data: dict[str, Any]) -> list[str]:
    tuned = ", tuned" if data["settings"]["tune"] else ""
    lines = []
    for row in data["rows"]:
        dense = next((each for each in data["rows"] if (each["part"], each["case"]) == (row["part"], "dense")), None)
        memory = ""
        if row["peak_bytes"] is not None:
            beside = dense and dense["peak_bytes"] and row["direction"] == dense["direction"]
            share = f", {ratio(row['peak_bytes'] / dense['peak_bytes'])}" if dense and beside else ""
            memory = f"{row['peak_bytes'] / 2**20:.0f} MiB{share}"
        lines.append([row["part"], f"{row['case']}, {row['direction']}", ms(row["ms"]), spread(row), roof(row), memory])
    columns = ["what", "case", "ms", "ratio to dense", "roof", "peak memory, to dense"]
    return [
        f"## A short look: {data['machine']['kind']}{tuned}",
        "",
        "One shape of each claim, in one run of a few minutes. Dense has the same precision. A ratio above 1 is faster.",
        "",
        ratios_of(data),
        "",
        *_said(data),
        *table(columns, lines, left=2),
        "",
    ]


def _said(head: dict[str, Any]) -> list[str]:
    """The check, the tests, and what failed, a line each."""
    said = []
    if "check" in head:
        failed = [f"{each['about']} ({each['what']})" for each in head["check"]["findings"] if each["state"] == "fails"]
        said.append(f"- `kronblocks doctor`: {'; '.join(failed) or 'everything works that should'}.")
    if "tests" in head:
        said.append(f"- `tests/gpu`: {'; '.join(head['tests']['said']) or 'nothing was said'}.")
    said += [f"- Not measured: {part} ({reason})." for part, reason in head["failed"].items()]
    said += [f"- Not everywhere: {name} ({reason})." for name, reason in head["skipped"].items()]
    return [*said, ""] if said else []
