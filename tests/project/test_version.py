"""The version is written in one place, and what has to repeat it says the same."""

import re
import tomllib
from pathlib import Path

import kronblocks
from kronblocks_lab.__main__ import main

ROOT = Path(__file__).parents[2]


def test_the_package_is_built_with_the_version_of_the_code():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["dynamic"] == ["version"]
    source = ROOT / pyproject["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert re.findall(r'^__version__ = "(.+)"$', source.read_text(), re.MULTILINE) == [kronblocks.__version__]


def test_the_command_tells_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"kronblocks {kronblocks.__version__}\n"


def test_the_citation_and_the_changelog_name_the_version():
    citation, changelog = (ROOT / "CITATION.cff").read_text(), (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {kronblocks.__version__}\n" in citation
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None and newest[1] == kronblocks.__version__
