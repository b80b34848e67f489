"""README's section on quality against time, from made-up comparisons."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.lab.test_time_to_quality import TIMES, timed

from kronblocks_lab.pages import time_to_quality
from kronblocks_lab.report import figures
from kronblocks_lab.report.page import write_report
from kronblocks_lab.report.results import find_runs


def results(folder: Path, *, dense: bool = True) -> Path:
    """A folder of results with the comparison of some trainings."""
    for seed, last in enumerate((0.8, 0.7)):
        if dense:
            timed(folder / f"runs/d{seed}", [0.4, 0.6, last], "dense", seed)
        timed(folder / f"runs/a{seed}", [0.6, 0.7, last + 0.1], seed=seed)
        timed(folder / f"runs/b{seed}", [0.3, 0.5, 0.6], "static", seed)
    write_report(find_runs([folder / "runs"]), folder / "out")
    (folder / time_to_quality.FILE).write_bytes((folder / "out/curves.json").read_bytes())
    return folder


def test_it_says_who_reached_what_and_how_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "panel", lambda draw, alt: figures.Picture("", alt, 1, 1))
    lines = time_to_quality.section(results(tmp_path), "figures")
    text = "\n".join(lines)
    row = "| two-phase 16x16 (rank 4, target 75 %) | 3.00 ± 0.000 | 85.00 ± 7.07 | "
    assert row in "\n".join(time_to_quality.rows(tmp_path))
    assert f"two-phase 16x16: 2.25 ± 0.35, 0.75{TIMES}; static 16x16: not reached." in text
    assert "Seconds on the clock: 2 threads on 2 processors" in text and "mean of 2 seeds" in text
    page = time_to_quality.with_section("# Readme\n\n## Speed\n\nfast\n", tmp_path, "figures")
    assert page.index("## Quality for the same time") < page.index("## Speed") and page.endswith("## Speed\n\nfast\n")
    assert time_to_quality.with_section(page, tmp_path, "figures") == page
    assert all(len(line) <= 98 for line in lines if not line.startswith(("|", "<")))
    time_to_quality.draw(tmp_path, tmp_path)
    for theme in ("light", "dark"):
        drawn = (tmp_path / f"time-to-quality-{theme}.svg").read_text()
        ElementTree.fromstring(drawn)
        texts = re.findall(r"<text[^>]*>([^<]*)", drawn)
        assert {"two-phase 85.0", "dense 75.0", "static 60.0", "seconds of training"} <= set(texts)


def test_without_results_or_dense_there_is_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "panel", lambda draw, alt: figures.Picture("", alt, 1, 1))
    assert time_to_quality.section(tmp_path, "figures") == time_to_quality.rows(tmp_path) == []
    assert time_to_quality.with_section("## Speed\n", tmp_path, "figures") == "## Speed\n"
    assert time_to_quality.section(results(tmp_path, dense=False), "figures") == []
    time_to_quality.draw(tmp_path, tmp_path)
    assert not list(tmp_path.glob("*.svg"))
