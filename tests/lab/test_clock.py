"""The clock of trainings, on readings that are made up."""

from __future__ import annotations

import pytest

from kronblocks_lab.training import clock as clocks
from kronblocks_lab.training.clock import Reading, TrainingClock


def clock(*readings: tuple[float, float, float | None]) -> TrainingClock:
    found = iter(Reading(*each) for each in readings)
    return TrainingClock(read=lambda: next(found))


def test_only_what_is_between_start_and_stop_counts():
    watch = clock((10, 1, 100), (12, 2.5, 102), (20, 9, 140), (21, 9.5, 141.5))
    watch.start()
    watch.stop()
    watch.stop()
    watch.start()
    watch.stop()
    assert (watch.seconds, watch.cpu_seconds, watch.other_seconds) == (3, 2, 1.5)


def test_a_resumed_clock_goes_on():
    watch = clock((0, 0, 0), (2, 1, 3), (0, 0, 0), (4, 2, 2))
    watch.start()
    watch.stop()
    state, watch.seconds = watch.state(), 99.0
    watch.load(state)
    watch.start()
    watch.stop()
    assert watch.state() == {"seconds": 6, "cpu_seconds": 3, "other_seconds": 2}


@pytest.mark.parametrize(
    ("own", "machine", "cores", "threads", "quiet"),
    [
        (10.0, 10.9, 2, 1, True),
        (10.0, 11.1, 2, 1, False),
        (10.0, 29.0, 64, 1, True),  # a twentieth of many processors
        (19.0, 19.0, 2, 2, True),
        (9.6, None, 2, 1, True),  # a single thread that hardly waited
        (9.4, None, 2, 1, False),
        (19.0, None, 2, 2, None),
        (19.0, 2.0, 2, 2, None),  # a count that misses this very process
    ],
)
def test_a_measurement_is_clean_where_others_left_the_machine_alone(monkeypatch, own, machine, cores, threads, quiet):
    monkeypatch.setattr(clocks.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(clocks.torch.cuda, "is_available", lambda: False)
    watch = clock((0, 0, 0 if machine is not None else None), (10, own, machine))
    watch.start()
    watch.stop()
    result = watch.result(threads)
    assert result["quiet"] is quiet and result["cores"] == cores
    assert (result["others"] is None) == (machine is None or machine < own)


def test_the_time_rises():
    first, second = clocks.reading(), clocks.reading()
    assert second.wall > first.wall and second.own >= first.own
    assert second.machine is None or second.machine >= (first.machine or 0.0) > 0
