"""The files of results: what they hold, when they may be continued, what is refused."""

from __future__ import annotations

import json

import pytest

from kronblocks import KronblocksError
from kronblocks_lab.bench.measure import results as files
from kronblocks_lab.bench.measure.results import Results, read, significant

COLUMNS, KEY = ("rows", "case", "ms"), ("rows", "case")


def opened(path, **settings):
    fresh = settings.pop("fresh", False)
    return Results.open(path, "ops", COLUMNS, KEY, {"threads": 2, **settings}, fresh=fresh)


def test_rows_come_back(tmp_path):
    path = tmp_path / "new" / "bench-ops.json"
    results = opened(path)
    results.add([{"rows": 1, "case": "dense", "ms": 2.0}, {"rows": 1, "case": "packed"}])
    assert read(path)["rows"] == [{"rows": 1, "case": "dense", "ms": 2.0}, {"rows": 1, "case": "packed", "ms": None}]
    again = opened(path)
    assert again.missing([{"rows": 1, "case": "dense"}, {"rows": 2, "case": "dense"}]) == [{"rows": 2, "case": "dense"}]
    again.add([{"rows": 1, "case": "packed", "ms": 1.0}, {"rows": 2, "case": "dense", "ms": 4.0}])
    assert [row["ms"] for row in read(path)["rows"]] == [2.0, 1.0, 4.0]  # the one with a known key was replaced


def test_each_row_is_one_line(tmp_path):
    path = tmp_path / "bench-ops.json"
    opened(path).add([{"rows": number, "case": "dense", "ms": 1.0} for number in range(3)])
    assert path.read_text().splitlines()[-5:-2] == ['[0, "dense", 1.0],', '[1, "dense", 1.0],', '[2, "dense", 1.0]']
    data = json.loads(path.read_text())
    assert data["version"] == 1 and data["kind"] == "ops" and data["columns"] == list(COLUMNS)
    assert {"torch", "kronblocks", "processor", "python"} <= data["versions"].keys()


def test_a_file_with_fewer_columns_goes_on(tmp_path):
    """Columns that a later version has are empty in older rows."""
    path = tmp_path / "ops.json"
    opened(path).add([{"rows": 1, "case": "dense", "ms": 2.0}])
    later = Results.open(path, "ops", (*COLUMNS, "roof"), KEY, {"threads": 2})
    later.add([{"rows": 2, "case": "dense", "ms": 3.0, "roof": 1.5}])
    assert [row["roof"] for row in read(path)["rows"]] == [None, 1.5]
    with pytest.raises(KronblocksError, match="other measurements"):
        opened(path)


def test_other_settings_and_machines_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "bench-ops.json"
    opened(path).add([{"rows": 1, "case": "dense", "ms": 2.0}])
    with pytest.raises(KronblocksError, match=r"other settings \(threads\): remove it"):
        opened(path, threads=1)
    with pytest.raises(KronblocksError, match=r"other measurements: remove it"):
        Results.open(path, "step", COLUMNS, KEY, {"threads": 2})
    monkeypatch.setattr(files, "versions", lambda: {"torch": "0", "kronblocks": "0", "processor": "another"})
    with pytest.raises(KronblocksError, match=r"torch, kronblocks, processor"):
        opened(path)
    assert opened(path, fresh=True).rows == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "columns": ["a"], "rows": [[1, 2]]}', '{"version": 9}']
)
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "bench-ops.json"
    path.write_text(text)
    with pytest.raises(KronblocksError, match=r"bench-ops\.json"):
        read(path)
    with pytest.raises(KronblocksError, match="cannot write"):
        opened(path / "below" / "bench-ops.json")


def test_few_digits():
    assert significant(1234567.0) == 1235000.0
    assert significant(0.000123456) == 0.0001235
    assert significant(None) is None
