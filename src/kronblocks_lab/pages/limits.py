"""The table of docs/limits.md from tests/in_the_field: loops, averages, wrappers, optimisers, loaders, compilers."""

from __future__ import annotations

import sys
from pathlib import Path

from kronblocks_lab.bench.page.tables import fill
from kronblocks_lab.pages import ROOT

PAGE = ROOT / "docs" / "limits.md"


def table() -> list[str]:
    """The rows, by group, in the order in which they are written."""
    sys.path.insert(0, str(ROOT))  # the tests of a clone are no package that is installed
    from tests.in_the_field import test_in_the_field
    from tests.in_the_field.cases import CASES, GROUPS

    _ = test_in_the_field  # importing it registers the cases
    lines = []
    for group in GROUPS:
        lines += [f"### {group.capitalize()}", "", "| what | | how, or why |", "| --- | --- | --- |"]
        lines += [f"| {case.name} | {case.outcome} | {case.why} |" for case in CASES if case.group == group]
        lines.append("")
    return lines[:-1]


def pages() -> dict[Path, str]:
    """The page with its table, as it should be."""
    return {PAGE: fill(PAGE.read_text(), "field", table())}
