"""Tests of image sets see tiny ones, and no network."""

import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.data.tiny_sets import COUNTS, tiny_idx, write

from kronblocks_lab.data.sources import SOURCES


@pytest.fixture(autouse=True)
def tiny_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sets of 40 + 20 images, an empty cache, no system package and no network."""
    for name, source in SOURCES.items():
        monkeypatch.setitem(SOURCES, name, replace(source, counts=COUNTS, installed=None))
    monkeypatch.setenv("KRONBLOCKS_DATA", str(tmp_path / "cache"))

    def offline(url: str, timeout: float) -> None:
        raise urllib.error.URLError(f"no network for {url}, {timeout} s")

    monkeypatch.setattr(urllib.request, "urlopen", offline)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder with a good tiny MNIST, for tests that spoil one file."""
    return write(tmp_path / "files", tiny_idx())
