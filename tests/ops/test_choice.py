"""The form of a finished layer, from timings."""

import dataclasses

import pytest

from kronblocks.ops import BlockGrid, BlockSize
from kronblocks.ops.costs import choice
from kronblocks.ops.costs.timing import REFERENCE
from kronblocks.ops.problem import Problem


@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ({REFERENCE: 1.0, "dense": 0.1, "packed": 0.5}, "packed"),
        ({REFERENCE: 1.0, "packed": 0.5, "coeff_first": 0.4}, "coeff_first"),
        ({REFERENCE: 1.0, "packed": 0.98}, "dense"),  # within what timings vary by
        ({REFERENCE: 1.0, "packed": 2.0}, "dense"),
        ({REFERENCE: 1.0, "dense": 0.5}, "dense"),  # nothing else was worth timing
    ],
)
def test_deployed_form(monkeypatch, seconds, form):
    """The plan "dense" builds its weight at every call; a deployed dense layer does not, so F.linear is what counts."""
    asked = []
    monkeypatch.setattr(choice, "timings", lambda problem, record=None: asked.append(problem) or seconds)
    assert choice.choose_deployed(Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=2, rows=8)).form == form
    assert all(not problem.training for problem in asked)


def test_factors_may_be_deployed_as_packed_values(monkeypatch):
    seconds = {True: {REFERENCE: 1.0, "coeff_first": 0.4, "packed": 0.5}, False: {REFERENCE: 1.1, "packed": 0.3, "dense": 2.0}}
    monkeypatch.setattr(choice, "timings", lambda problem, record=None: seconds[problem.rank is not None])
    problem = Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=2, tile_groups=4, rows=8)
    chosen = choice.choose_deployed(problem)
    assert chosen.form == "values"
    assert chosen.seconds == pytest.approx(0.3 / 1.1), "timed on a slower day, on which dense took 1.1 and not 1.0"
    assert choice.choose_deployed(dataclasses.replace(problem, rank=None, tile_groups=1)).form == "packed"


@pytest.mark.parametrize(("rows", "form"), [(1, "dense"), (4, "dense"), (5, "packed")])
def test_a_few_rows_want_a_clear_gain(monkeypatch, rows, form):
    """Their time is that of fetching weights, and varies with what else is in the caches."""
    monkeypatch.setattr(choice, "timings", lambda problem, record=None: {REFERENCE: 1.0, "packed": 0.85})
    problem = Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=None, rows=rows)
    chosen = choice.choose_deployed(problem)
    assert chosen.form == form and chosen.seconds == {"dense": 1.0, "packed": 0.85}[form]
