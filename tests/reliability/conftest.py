"""Faults are tried a few times in every test run, and many times by `make reliability`, which writes down what happened."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kronblocks_lab.training.versions import versions

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "reliability.json"
FULL = os.environ.get("KRONBLOCKS_RELIABILITY") == "full"
_ROWS: list[dict[str, str]] = []


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """How often to try something: `times(few, many)`."""
    return lambda few, many: many if FULL else few


@pytest.fixture
def record() -> Callable[[str, str, str], None]:
    """Note a fault, what was tried, and what happened."""
    return lambda fault, tried, happened: _ROWS.append({"fault": fault, "tried": tried, "happened": happened})


@pytest.fixture(scope="session", autouse=True)
def written() -> Iterator[None]:
    """Write the notes of a full run."""
    start = time.perf_counter()
    yield
    if FULL and _ROWS:
        seconds = round(time.perf_counter() - start)
        RESULTS.write_text(json.dumps({"versions": versions(), "seconds": seconds, "rows": _ROWS}, indent=1) + "\n")
