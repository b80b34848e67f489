"""Write the report of finished trainings: report.html, report.md without figures, and curves.json, quality over time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from kronblocks.core.errors import KronblocksError
from kronblocks.core.files import write_text
from kronblocks_lab.report import costs, figures, search_figure, styles
from kronblocks_lab.report.comparison import compared, conditions
from kronblocks_lab.report.results import Run
from kronblocks_lab.report.samples import Verbatim, samples
from kronblocks_lab.report.sizes import sizes_of
from kronblocks_lab.report.time_figure import quality_over_time
from kronblocks_lab.report.time_to_quality import TimeToQuality


def write_report(runs: Sequence[Run], out: Path, *, title: str = "Block-sparse training, compared") -> Path:
    """Write report.html, a single self-contained file, report.md and curves.json into a folder.

    Returns:
        The path of report.html.

    Raises:
        KronblocksError: there are no runs, or the folder cannot be written to.
    """
    if not runs:
        raise KronblocksError("there is nothing to report: name at least one finished training")
    tasks, pages = compared(runs), {}
    settings = [row.runs[0].settings for task in tasks for row in task.rows]
    content = {
        "title": title,
        "tasks": tasks,
        "figures": figures,
        "costs": costs,
        "looks": figures.looks,
        "markers": styles.MARKERS,
        "search_pictures": search_figure.pictures,
        "samples": samples,
        "conditions": conditions([run.result for run in runs]),
        "quality_over_time": quality_over_time,
        "sizes": sizes_of([run.folder for run in runs]),
        "times": (times := {task.name: TimeToQuality(task) for task in tasks}),
    }
    content["settings"] = {name: [each.get(name, "") for each in settings] for each in settings for name in each}
    options: dict[str, dict[str, Any]] = {"report.md": {"finalize": _plain}, "report.html": {"autoescape": True}}
    for name, own in options.items():
        own |= {"loader": jinja2.FileSystemLoader(Path(__file__).parent), "undefined": jinja2.StrictUndefined}
        templates = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **own)
        pages[name] = templates.get_template(f"{name}.jinja").render(content)
    pages["curves.json"] = json.dumps({name: each.to_dict() for name, each in times.items() if each}, indent=1)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            write_text(out / name, text)
    except OSError as error:
        raise KronblocksError(f"cannot write the report into {out}: {error.strerror}; choose another --out") from error
    return out / "report.html"


def _plain(value: object) -> str:
    """Text that Markdown shows as it is; verbatim text as a block of code."""
    if isinstance(value, Verbatim):
        return "\n".join(f"    {line}" for line in value.split("\n"))
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", re.sub(r"\s", " ", str(value)))
