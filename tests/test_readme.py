"""The README's code runs, its commands exist, and its generated parts are up to date."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import kronblocks
from kronblocks.experiments.bench.page import write
from kronblocks.experiments.reproduce.page import write as write_experiments

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet, capsys):
    scope: dict = {}
    exec(snippet, scope)
    if "sparsifier" in scope:
        assert "of the weights in zero blocks" in capsys.readouterr().out
        # the last block that was needed may be of 256 of the weights
        assert 0.9 <= scope["sparsifier"].sparsity < 0.9 + 256 / (784 * 512)
    if "again" in scope:
        assert all(torch.equal(a, b) for a, b in zip(scope["model"].parameters(), scope["again"].parameters(), strict=True))


def test_there_is_a_snippet_and_links_lead_somewhere():
    assert any("sparsifier =" in each for each in SNIPPETS) and any("again =" in each for each in SNIPPETS)
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not leads_somewhere(link)] == []


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
    page = write(ROOT / "benchmarks/results", tmp_path / "benchmarks.md")
    assert page.read_text() == (ROOT / "docs/benchmarks.md").read_text(), "run kronblocks bench tables"


def test_the_page_of_the_experiments_is_what_the_results_say(tmp_path):
    page = write_experiments(ROOT / "benchmarks/results", tmp_path / "experiments.md")
    assert page.read_text() == (ROOT / "docs/experiments.md").read_text(), "run kronblocks reproduce tables"


def test_tables_of_the_pages_are_what_the_results_say():
    found = runpy.run_path(str(ROOT / "benchmarks/tables.py"))["pages"]()
    for path, content in found.items():
        assert content == path.read_text(), f"run python benchmarks/tables.py: {path.name} is out of date"


def test_everything_public_is_exported_and_documented():
    for name in kronblocks.__all__:
        assert getattr(kronblocks, name).__doc__, name
