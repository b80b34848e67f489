"""The code on the pages of the docs runs, from top to bottom of each page, and their generated tables are up to date."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from tests.project.prose import code_lines, sentences, words

import kronblocks
from kronblocks.config.methods import METHODS
from kronblocks_lab.pages import reliability, scale

ROOT = Path(__file__).parents[2]
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "design.md"], ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, request):
    there = set(METHODS)
    request.addfinalizer(lambda: [METHODS.pop(name) for name in METHODS.keys() - there])  # what a page registers
    torch.manual_seed(0)
    scope: dict = {"__name__": page.stem}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            exec(compile(snippet, str(page), "exec"), scope)
    if page.stem == "tutorial":
        assert scope["accuracy"](scope["model"]) > 0.93 and scope["sparsifier"].sparsity >= 0.9
    if page.stem == "deploying":
        assert all(torch.equal(a, b) for a, b in zip(scope["model"].parameters(), scope["again"].parameters(), strict=True))


EVERY_PAGE = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md", *EVERY_PAGE], ids=lambda page: page.stem)
def test_a_page_is_easy_to_read(page):
    found = sentences(page.read_text())
    assert [each for each in found if words(each) > 35] == []
    assert sum(map(words, found)) / len(found) <= 17
    assert [line for line in code_lines(page.read_text()) if len(line) > 84] == []


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: page.stem)
def test_a_page_links_the_words_that_it_uses(page):
    assert page.name == "words.md" or "](words.md)" in page.read_text()


@pytest.mark.parametrize("module", [scale, reliability])
def test_a_generated_page_is_what_its_program_writes(module):
    for path, text in module.pages().items():
        assert text == path.read_text(), "run python -m kronblocks_lab.pages"


def test_everything_public_has_a_place_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    named = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith(":::")}
    assert set(kronblocks.__all__) - named == set()


def _place(path: Path) -> str:
    """The words of the design's tree for a module."""
    return "*_kernels.py" if path.name.endswith("_kernels.py") else path.name


def test_every_module_has_a_place_in_the_design():
    tree = (ROOT / "docs" / "design.md").read_text()
    modules = [path for path in (ROOT / "src" / "kronblocks").rglob("*.py") if not path.name.startswith("__")]
    assert [str(path.relative_to(ROOT)) for path in modules if _place(path) not in tree and "bench" not in path.parts] == []


def test_every_equation_has_a_number_of_its_own_and_those_that_are_cited_exist():
    numbers = re.findall(r"\\tag\{(\d+)\}", (ROOT / "docs" / "math.md").read_text())
    assert len(numbers) == len(set(numbers))
    files = [*(ROOT / "src").rglob("*.py"), *EVERY_PAGE]
    cited = {number for file in files for number in re.findall(r"\bequations? (\d+)", file.read_text())}
    assert len(cited) > 10 and cited <= set(numbers)
