"""The timings' cache: hits, misses, damage, several processes, folders that cannot be used."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kronblocks.core import cache as kept
from kronblocks.core.cache import cache_folder
from kronblocks.ops import BlockGrid, BlockSize, Problem, choose_plan
from kronblocks.ops.costs import timing_cache
from kronblocks.ops.costs.timing import REFERENCE
from kronblocks.ops.costs.timing_cache import forget_timings, load_tables, timings

PROBLEM = Problem(BlockGrid(64, 64, BlockSize(4, 4)), rank=2, rows=100, density=0.5)
SECONDS = {REFERENCE: 4.0, "dense": 5.0, "packed": 1.0}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("KRONBLOCKS_CACHE", str(tmp_path / "cache"))
    forget_timings()
    yield tmp_path / "cache" / "timings"
    forget_timings()


@pytest.fixture(autouse=True)
def measured(monkeypatch) -> list[Problem]:
    """The problems that were measured; every plan's time is its number times the density, `F.linear`'s is fixed."""
    calls: list[Problem] = []

    def measure(problem: Problem) -> dict[str, float]:
        calls.append(problem)
        return {name: value * (1 if name == REFERENCE else problem.density) for name, value in SECONDS.items()}

    monkeypatch.setattr(timing_cache, "measure", measure)
    return calls


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_measured_once_in_a_process_and_once_on_a_machine(folder, measured):
    first = timings(PROBLEM)
    assert timings(PROBLEM) == first and len(measured) == 1
    forget_timings()
    assert timings(PROBLEM) == first and len(measured) == 1
    only_file(folder).unlink()
    assert timings(PROBLEM) == first and len(measured) == 1, "the process still knows"
    forget_timings()
    assert timings(PROBLEM) == first and len(measured) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 3},
        {"rows": 101},
        {"tile_groups": 2},
        {"training": False},
        {"input_grad": False},
        {"dtype": torch.float64},
        {"grid": BlockGrid(64, 64, BlockSize(4, 2))},
        {"density": 0.25},
    ],
)
def test_what_timings_depend_on(change, measured):
    timings(PROBLEM)
    timings(dataclasses.replace(PROBLEM, **change))
    assert len(measured) == 2


def test_threads_and_backend_are_part_of_the_question(measured, monkeypatch):
    timings(PROBLEM)
    monkeypatch.setattr(timing_cache.torch, "get_num_threads", lambda: 99)
    timings(PROBLEM)
    monkeypatch.setattr(timing_cache, "backend_key", lambda device, dtype: "native avx512")
    timings(PROBLEM)
    assert len(measured) == 3


def test_the_gate_is_not(measured):
    timings(PROBLEM)
    timings(dataclasses.replace(PROBLEM, gate=True))
    assert len(measured) == 1


def test_a_training_measures_a_shape_a_few_times(measured):
    for live in range(256, 25, -1):
        timings(dataclasses.replace(PROBLEM, density=live / 256))
    assert [problem.density for problem in measured] == [1.0, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize("density", [1.0, 0.9, 0.75, 0.5, 0.3, 0.1, 0.013, 1 / 256])
def test_times_between_measured_densities_are_linear(density):
    found = timings(dataclasses.replace(PROBLEM, density=density))
    # a density within a twentieth of an interval from a measured one counts as that one
    assert found["packed"] == pytest.approx(density, rel=0.05)
    assert found[REFERENCE] == 4.0


def test_plans_timed_on_one_side_only_are_bounded_from_above(monkeypatch):
    """At density 1 packed was hopeless, at 1/2 tile_first: between them the one costs in proportion, the other as much."""
    tables = {1.0: {REFERENCE: 4.0, "dense": 5.0, "tile_first": 3.0}, 0.5: {REFERENCE: 4.0, "dense": 5.0, "packed": 1.0}}
    monkeypatch.setattr(timing_cache, "measure", lambda problem: tables[problem.density])
    found = timings(dataclasses.replace(PROBLEM, density=0.75))
    assert found == pytest.approx({REFERENCE: 4.0, "dense": 5.0, "tile_first": 3.0, "packed": 1.5})


def test_densities_below_one_block_and_grids_of_one_block():
    assert timings(dataclasses.replace(PROBLEM, density=0.0))["packed"] == 1 / 256
    whole = dataclasses.replace(PROBLEM, grid=BlockGrid(4, 4, BlockSize(4, 4)), density=1.0)
    assert timings(whole)["packed"] == 1.0


def test_rows_beyond_the_measured_ones_cost_in_proportion(measured):
    assert timings(dataclasses.replace(PROBLEM, rows=8192))[REFERENCE] == 8.0
    assert timings(dataclasses.replace(PROBLEM, rows=40960))[REFERENCE] == 40.0
    assert [problem.rows for problem in measured] == [4096]


DAMAGE = {
    "empty": "",
    "no JSON": "{",
    "bytes": b"\xff\xfe\x00",
    "list": "[]",
    "deep": "[" * 60_000,
    "version": {"version": 2},
    "foreign key": {"key": "{}"},
    "no seconds": {"seconds": None},
    "no plans": {"seconds": {REFERENCE: 1.0}},
    "unknown plan": {"seconds": {REFERENCE: 1.0, "sparse": 1.0}},
    "zero": {"seconds": {REFERENCE: 1.0, "dense": 0.0}},
    "negative": {"seconds": {REFERENCE: 1.0, "dense": -1.0}},
    "infinite": '{"version": 4, "key": KEY, "seconds": {"F.linear": 1.0, "dense": 1e999}}',
    "NaN": '{"version": 4, "key": KEY, "seconds": {"F.linear": 1.0, "dense": NaN}}',
    "huge": '{"version": 4, "key": KEY, "seconds": {"F.linear": 1.0, "dense": ' + "9" * 5000 + "}}",
    "text": {"seconds": {REFERENCE: 1.0, "dense": "1.0"}},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_files_are_measured_anew(damage, folder, measured):
    right = timings(PROBLEM)
    path, content = only_file(folder), DAMAGE[damage]
    sound = json.loads(path.read_text())
    match content:
        case dict():
            path.write_text(json.dumps({**sound, **content}))
        case bytes():
            path.write_bytes(content)
        case str():
            path.write_text(content.replace("KEY", json.dumps(sound["key"])))
    forget_timings()
    assert timings(PROBLEM) == right and len(measured) == 2
    assert json.loads(only_file(folder).read_text()) == sound, "the damage is mended"


def test_something_else_in_the_files_place(folder, measured):
    timings(PROBLEM)
    path = only_file(folder)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    forget_timings()
    assert len(timings(PROBLEM)) == 3 and len(measured) == 2
    path.unlink()
    path.mkdir()
    forget_timings()
    assert len(timings(PROBLEM)) == 3
    assert [each.name for each in folder.iterdir()] == [path.name], "nothing temporary is left"


def test_folders_that_cannot_be_written_to_are_no_obstacle(tmp_path, monkeypatch, measured, recwarn, capfd):
    (tmp_path / "file").write_text("")
    for setting in (tmp_path / "file" / "below", "/proc/nothing/here"):
        monkeypatch.setenv("KRONBLOCKS_CACHE", str(setting))
        forget_timings()
        assert len(timings(PROBLEM)) == 3
    assert len(measured) == 2 and not recwarn.list and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("setting", ["0", "off", "OFF"])
def test_the_disk_can_be_switched_off(setting, monkeypatch, tmp_path):
    monkeypatch.setenv("KRONBLOCKS_CACHE", setting)
    monkeypatch.chdir(tmp_path)
    assert cache_folder() is None
    timings(PROBLEM)
    assert not list(tmp_path.iterdir())


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.delenv("KRONBLOCKS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kronblocks"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, place in (("linux", ".cache"), ("darwin", "Library/Caches")):
        monkeypatch.setattr(kept.sys, "platform", platform)
        assert cache_folder() == tmp_path / place / "kronblocks"
    monkeypatch.setattr(kept.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert cache_folder() == tmp_path / "local" / "kronblocks"


def _hammer(folder: str, number: int) -> None:
    os.environ["KRONBLOCKS_CACHE"] = folder
    for turn in range(30):
        forget_timings()
        seconds = {REFERENCE: 1.0, "dense": float(number + 1)}
        timing_cache._write(timing_cache._key(PROBLEM), seconds)
        found = timing_cache._read(timing_cache._key(PROBLEM))
        assert found is not None and found["dense"] in (1.0, 2.0, 3.0, 4.0), (number, turn)


def test_processes_that_write_at_once(folder):
    """A reader sees one of the whole files, never half of one or none."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hammer, args=(str(folder.parent), number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert only_file(folder).suffix == ".json"


def test_the_timings_of_a_quicker_process_are_taken(folder, monkeypatch):
    """Two trainings that start together had better go on with the same numbers."""

    def measure(problem: Problem) -> dict[str, float]:
        timing_cache._write(timing_cache._key(problem), SECONDS)  # as if another process had finished meanwhile
        return {REFERENCE: 1.0, "dense": 1.0}

    monkeypatch.setattr(timing_cache, "measure", measure)
    assert timings(PROBLEM) == SECONDS


def test_record_and_load(folder, measured):
    record: timing_cache.Tables = {}
    right = timings(dataclasses.replace(PROBLEM, density=0.4), record)
    assert len(record) == 2 and len(measured) == 2
    forget_timings()
    load_tables({**record, "nonsense": 3, "wrong": {REFERENCE: -1.0, "dense": 1.0}})
    for path in folder.iterdir():
        path.unlink()
    assert timings(dataclasses.replace(PROBLEM, density=0.4)) == right and len(measured) == 2


def test_a_measured_choice_says_so(measured):
    choice = choose_plan(PROBLEM, measure=True)
    assert choice.plan == "packed" and choice.seconds == {REFERENCE: 4.0, "dense": 2.5, "packed": 0.5}
    assert choice.why == (
        "packed: measured 500 ms against 4.00 s for dense F.linear, for 64x64 in 4x4 blocks at density 0.50 and 100 rows; "
        "the others relative to it: dense 5.00x"
    )
    assert choose_plan(PROBLEM).seconds is None and len(measured) == 1, "without measure=True the cache is not even asked"


def test_nothing_measured_falls_back_on_the_estimate(monkeypatch):
    monkeypatch.setattr(timing_cache, "measure", lambda problem: {})
    assert choose_plan(PROBLEM, measure=True) == choose_plan(PROBLEM)
