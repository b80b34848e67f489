"""`kronblocks bench short --quick` on a CPU: every part runs, failures are written, and the page shows a card."""

from __future__ import annotations

import json
import re

import pytest

from kronblocks.advice.doctor import Finding
from kronblocks.core.errors import KronblocksError
from kronblocks_lab.__main__ import main
from kronblocks_lab.bench import short, whole_model
from kronblocks_lab.bench.measure.results import read
from kronblocks_lab.bench.page.short import short_part
from kronblocks_lab.bench.short import TINY, ShortSettings, parts, run, run_tests

pytestmark = pytest.mark.slow

LINE = "bench short --quick --threads 1 --seconds 1e-4 --repeats 2 --out"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of one run."""
    folder = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(short, "examine", lambda: [Finding("torch", "ok", "2")])
        known = {"peak_bytes": 2**20, "first_loss": 2.0, "last_loss": 1.0}  # of processes that tests/lab/bench has elsewhere
        patched.setattr(whole_model, "alone", lambda *_: known)
        main([*LINE.split(), str(folder)])
    return folder / "bench-short.json"


def test_every_part_is_measured_beside_dense(results):
    data = read(results)
    assert data["failed"] == {} and data["check"]["works"] and "tests" not in data
    assert list(dict.fromkeys(row["part"] for row in data["rows"])) == list(parts(TINY)) == list(data["seconds"])
    for part in parts(TINY):
        rows = [row for row in data["rows"] if row["part"] == part]
        assert {row["direction"] for row in rows if row["case"] == "dense"} == {row["direction"] for row in rows}
        assert len(rows) >= 2 and all(row["ms"] > 0 and row["dense_ms"] > 0 for row in rows)
    assert {"factors r=1 8x8 auto", "factors r=4 auto", "values packed", "exported", "live blocks"} <= {
        row["case"] for row in data["rows"]
    }


def test_the_same_command_goes_on_and_what_fails_does_not_stop_it(results, monkeypatch, tmp_path):
    data = json.loads(results.read_text())
    first, second, third, *_ = parts(TINY)
    data["rows"] = [row for row in data["rows"] if row[0] not in (first, second, third)]
    (tmp_path / results.name).write_text(json.dumps(data))
    ran = []

    def fails(settings, found, tell):
        ran.append("fails")
        raise RuntimeError("no kernel\nimage")

    def works(settings, found, tell):
        ran.append("works")
        return [{"case": "dense", "direction": "forward", "ms": 1.0}]

    monkeypatch.setattr(short, "parts", lambda sizes: {**parts(sizes), first: fails, second: works})
    clock = iter([0.0, *[1.0] * 6, *[1e4] * 20])  # seconds: time is over after two parts, which ask three times each
    settings = ShortSettings(quick=True, threads=1, seconds=1e-4, repeats=2, out=tmp_path)
    found = run(settings, clock=lambda: next(clock))
    assert ran == ["fails", "works"]
    assert found.head["failed"].keys() == {first, third}
    assert found.head["failed"][first] == "RuntimeError: no kernel\nimage"
    assert found.head["failed"][third].startswith("not begun within 8 minutes")
    assert {row["part"] for row in found.rows} == set(parts(TINY)) - {first, third}
    assert [line.split(":")[0] for line in short.problems(found.head)][:1] == [first.split(":")[0]]


def test_a_failure_ends_with_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(short, "examine", lambda: [Finding("cache", "fails", "cannot be written to")])
    monkeypatch.setattr(short, "parts", lambda sizes: {})
    with pytest.raises(SystemExit) as ended:
        main([*LINE.split(), str(tmp_path)])
    assert ended.value.code == 1 and "cache: cannot be written to" in capsys.readouterr().out


def test_the_tests_of_a_folder_run_in_a_process_of_their_own(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    assert 0, 'so'\n")
    found = run_tests(tmp_path, 60)
    assert found["status"] == 1
    assert found["said"][0].startswith("FAILED") and "1 failed, 1 passed" in found["said"][-1]
    assert run_tests(tmp_path, 0.01) == {"status": None, "said": ["not done after 0 seconds"]}


def test_settings_that_do_not_go_together():
    for given, said in (({}, "add --device cuda, or --quick"), ({"quick": True, "minutes": 0}, "--minutes is a time above 0")):
        with pytest.raises(KronblocksError, match=said):
            ShortSettings(**given)
    with pytest.raises(KronblocksError, match="leave --dtype"):
        ShortSettings(quick=True, dtype="bf16")
    assert ShortSettings(device="cuda", tune=True).path.name == "bench-short-cuda-tuned.json"


def test_the_page_names_the_card(results, tmp_path):
    assert short_part(tmp_path) == []
    data = json.loads(results.read_text())
    data["settings"]["tune"] = True
    data["machine"]["kind"] = "NVIDIA A"
    data["tests"] = {"status": 0, "said": ["5 passed"]}
    data["failed"] = {"a part": "RuntimeError: why"}
    peak, case = data["columns"].index("peak_bytes"), data["columns"].index("case")
    for row in data["rows"]:
        row[peak] = 2**22 if row[case] == "dense" else 2**20
    (tmp_path / "bench-short-cuda-tuned.json").write_text(json.dumps(data))
    text = "\n".join(short_part(tmp_path))
    assert "## A short look: NVIDIA A, tuned" in text and "everything works that should" in text
    assert "`tests/gpu`: 5 passed." in text and "Not measured: a part (RuntimeError: why)." in text
    assert re.search(r"\| values packed, forward \| .* \| 1 MiB, 0.25 \|", text)
