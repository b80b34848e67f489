"""`kronblocks report`: write the report of finished trainings again."""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.console import Console

from kronblocks.core.errors import KronblocksError
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs


def main(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Write the report of finished trainings again.

    Args:
        folders: folders of trainings, or folders that contain such folders.
        out: folder for report.html and report.md; unset: the first folder.
    """
    if not folders:
        raise KronblocksError("name at least one folder: kronblocks report runs/demo")
    say_where(write_report(find_runs(folders), out or folders[0]))


def say_where(report: Path) -> None:
    """Print a report's path on one line, so that terminals make it a link."""
    Console().print(f"report: {report.resolve()}", soft_wrap=True, highlight=False)
