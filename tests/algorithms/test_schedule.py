"""The schedule is a pure function of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kronblocks import KronblocksError
from kronblocks.algorithms import SparsitySchedule


@given(st.integers(20, 5000), st.sampled_from(["cubic", "linear", "staircase"]), st.floats(0.01, 0.99))
def test_sparsity_rises_from_zero_to_exactly_the_target(total, shape, target):
    schedule = SparsitySchedule(target, total, shape=shape)
    values = [schedule.sparsity_at(step) for step in range(total + 1)]
    assert values[schedule.start_step] == 0
    assert values == sorted(values)
    assert all(value == target for value in values[schedule.end_step :])


def test_cubic_values_against_the_formula():
    schedule = SparsitySchedule(0.8, 1000, start=0.1, end=0.5)
    for step in (100, 150, 300, 499):
        fraction = (step - 100) / 400
        assert schedule.sparsity_at(step) == pytest.approx(0.8 * (1 - (1 - fraction) ** 3), rel=1e-12)


@given(st.integers(20, 3000))
def test_updates_lie_in_the_span_and_include_lift_and_end(total):
    schedule = SparsitySchedule(0.9, total, lift_at=2 / 3)
    updates = [step for step in range(total + 1) if schedule.is_update(step)]
    assert schedule.lift_step is not None
    assert {schedule.lift_step, schedule.end_step} <= set(updates)
    assert min(updates) > schedule.start_step and max(updates) == schedule.end_step
    assert len(updates) >= min(9, schedule.end_step - schedule.start_step)


def test_phases_follow_one_another():
    schedule = SparsitySchedule(0.9, 1000, lift_at=2 / 3)
    assert [schedule.phase_at(step) for step in (0, 349, 350, 499, 500, 1000)] == [
        "discover",
        "discover",
        "refine",
        "refine",
        "heal",
        "heal",
    ]
    assert SparsitySchedule(0.9, 1000).phase_at(400) == "discover"


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, "10"])
def test_wrong_numbers_of_steps_are_refused(steps):
    with pytest.raises(KronblocksError, match="total_steps"):
        SparsitySchedule(0.9, steps)


@pytest.mark.parametrize(("steps", "start", "end"), [(1, 0.05, 0.5), (3, 0.5, 0.6), (9, 0.58, 0.6)])
def test_a_trial_of_a_step_or_so_prunes_nothing(steps, start, end):
    schedule = SparsitySchedule(0.9, steps, start=start, end=end, lift_at=2 / 3)
    assert not schedule.prunes and schedule.lift_step is None
    for step in range(steps + 1):
        assert not schedule.is_update(step) and schedule.sparsity_at(step) == 0 and schedule.phase_at(step) == "discover"


def test_a_training_that_would_never_prune_is_refused():
    with pytest.raises(KronblocksError, match="1000 steps are too few to prune from 0.5 to 0.5001 of the training: let schedule"):
        SparsitySchedule(0.9, 1000, start=0.5, end=0.5001)
