"""The README's code runs, its commands exist, and its generated parts are up to date; so are those of the site's first page."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import pytest

import kronblocks
from kronblocks_lab.bench.page.page import write
from kronblocks_lab.pages import front, tables, time_to_quality
from kronblocks_lab.pages import front_figures as figures
from kronblocks_lab.reproduce.page.page import write as write_experiments

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INDEX = (ROOT / "docs" / "index.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, INDEX], ids=["readme", "index"])
def test_the_first_code_runs_and_prints_what_is_shown(page, capsys):
    code, shown = next(PRINTED.finditer(page)).groups()
    scope: dict = {}
    exec(code, scope)
    printed = capsys.readouterr().out
    assert _without_counts(printed) == _without_counts(shown)
    assert "160 of 1600 blocks live, 0.9000 of the weights in zero blocks" in printed.splitlines()
    # the last block that was needed may be of 256 of the weights
    assert 0.9 <= scope["sparsifier"].sparsity < 0.9 + 256 / (784 * 512)


def _without_counts(report: str) -> list[list[str]]:
    """Cells of a report but for the numbers of live blocks, which depend on the seed."""
    return [re.sub(r"\d+ / |\d\.\d+", "", line).split() for line in report.splitlines()]


def test_all_code_shows_what_it_prints():
    assert len(SNIPPETS) == len(PRINTED.findall(README)) == 1


def test_links_lead_somewhere():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(r'src(?:set)?="([^"]+)"', README)
    assert len(links) >= 11
    assert [link for link in links if not leads_somewhere(link)] == []
    pictures = re.findall(r'src(?:set)?="([^"]+)"', INDEX)
    assert pictures and [each for each in pictures if not (ROOT / "docs" / each).exists()] == []


def test_the_first_screen_is_short():
    assert len(README.splitlines()) - len(time_to_quality.section(front.RESULTS, "")) < 150
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert tables and all(len(table.splitlines()) - 2 <= 10 for table in tables)
    code = [line for block in re.findall(r"```\w+\n(.*?)```", README + INDEX, re.DOTALL) for line in block.splitlines()]
    assert [line for line in code if len(line) > 84] == []
    prose = [line for line in README.splitlines() if not line.startswith(("|", "<"))]
    assert [line for line in prose if len(line) > 100] == []


def leads_somewhere(link: str) -> bool:
    page, _, heading = link.partition("#")
    if not heading or not (ROOT / page).exists():
        return (ROOT / page).exists()
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    return heading in [re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings]


def test_commands_are_targets_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(commands) <= set(targets)


def test_the_benchmark_page_is_what_the_results_say(tmp_path):
    shutil.copy(ROOT / "docs/benchmarks.md", tmp_path)  # whose prose stays
    page = write(ROOT / "benchmarks/results", tmp_path / "benchmarks.md")
    assert page.read_text() == (ROOT / "docs/benchmarks.md").read_text(), "run kronblocks bench tables"


def test_the_page_of_the_experiments_is_what_the_results_say(tmp_path):
    shutil.copy(ROOT / "docs/experiments.md", tmp_path)  # whose prose stays
    page = write_experiments(ROOT / "benchmarks/results", tmp_path / "experiments.md")
    assert page.read_text() == (ROOT / "docs/experiments.md").read_text(), "run kronblocks reproduce tables"


def test_tables_of_the_pages_are_what_the_results_say():
    found = tables.pages()
    for path, content in found.items():
        assert content == path.read_text(), f"run python -m kronblocks_lab.pages: {path.name} is out of date"


def test_numbers_and_charts_are_what_the_results_say(tmp_path):
    for path, content in front.pages().items():
        assert content == path.read_text(), f"run python -m kronblocks_lab.pages: {path.name} is out of date"
    front.draw(tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert len(drawn) == 6 + 2 * (time_to_quality.comparison(front.RESULTS) is not None)
    for path in drawn:  # the words and numbers: coordinates may differ in the last digit
        texts = [re.findall(r"<text[^>]*>([^<]*)", each.read_text()) for each in (path, front.FIGURES / path.name)]
        assert texts[0] and texts[0] == texts[1], f"run python -m kronblocks_lab.pages: {path.name} is out of date"


def test_the_three_numbers_are_the_lowest_over_machines():
    ratios = [front._training_ratio(data) for data in front._files("train")]
    assert len(ratios) >= 2 and f"| {min(ratios):.1f}x as fast |" in README and f"| {min(ratios):.1f}x as fast |" in INDEX


def test_examples_of_the_figures():
    assert doctest.testmod(figures).attempted and not doctest.testmod(figures).failed


def test_everything_public_is_exported_and_documented():
    for name in kronblocks.__all__:
        assert getattr(kronblocks, name).__doc__, name
