"""Each row of the table in docs/limits.md is tried, and the table is what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.in_the_field import averages, compilers, habits, loaders, loops, optimisers, trainers, wrappers
from tests.in_the_field.cases import CASES, GROUPS, Case

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROOMS = (loops, habits, trainers, averages, wrappers, optimisers, loaders, compilers)


def _parameter(case: Case) -> object:
    marks = [pytest.mark.xfail(strict=True, reason=case.why)] if case.outcome == "does not work yet" else []
    marks += [pytest.mark.needs("onnx")] if "onnx" in case.needs else []
    return pytest.param(case, id=f"{case.group}: {case.name}", marks=marks)


@pytest.mark.parametrize("case", [_parameter(case) for case in CASES])
def test_a_row(case, tmp_path):
    case.try_(tmp_path)


def test_rows_are_whole():
    assert len({(case.group, case.name) for case in CASES}) == len(CASES) == sum(_rows_in(room) for room in ROOMS)
    for case in CASES:
        assert case.group in GROUPS and case.why and "\n" not in case.why and "|" not in case.why, case.name
        assert (case.outcome == "refused") is bool(case.words), case.name


def _rows_in(room: object) -> int:
    return sum(case.run.__module__ == getattr(room, "__name__", "") for case in CASES)


def _write_limits(page: str) -> None:
    from kronblocks_lab.pages import limits

    (text,) = limits.pages().values()
    Path(page).write_text(text)


def test_the_table_is_what_the_rows_say(tmp_path, processes):
    before = (ROOT / "docs" / "limits.md").read_text()
    processes.run(_write_limits, str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == before, "run python -m kronblocks_lab.pages"
