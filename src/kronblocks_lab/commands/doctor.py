"""`kronblocks doctor`: whether what should work on this machine does, a line each."""

from __future__ import annotations

import json as text

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kronblocks.advice.doctor import Finding, as_json, examine, works

_COLOURS = {"ok": "green", "note": "yellow", "fails": "bold red"}


def main(json: bool = False) -> None:
    """Look whether what should work on this machine does: versions, kernels, cache, GPUs, results and speed.

    The exit status is 1 if something does not. A bug report begins with what this prints.

    Args:
        json: print JSON instead of lines.
    """
    findings = examine()
    console = Console(highlight=False)
    if json:
        console.print(text.dumps(as_json(findings), indent=2), markup=False, soft_wrap=True)
    else:
        console.print(_table(findings))
        console.print(_last_line(findings), markup=False, soft_wrap=True)
    if not works(findings):
        raise SystemExit(1)


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    for column in ("state", "about", "what"):
        table.add_column(column, overflow="fold", no_wrap=column != "what")
    for each in findings:
        table.add_row(f"[{_COLOURS[each.state]}]{each.state}[/]", Text(each.about), Text(each.what))
    return table


def _last_line(findings: list[Finding]) -> str:
    failed = sum(each.state == "fails" for each in findings)
    if not failed:
        return "everything works that should"
    return f"{failed} of {len(findings)} fail: please report this with what you did"
