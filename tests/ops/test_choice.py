"""The form of a finished layer, from timings."""

import pytest

from kronblocks import BlockGrid, BlockSize
from kronblocks.ops import choice
from kronblocks.ops.cost import Problem
from kronblocks.ops.timing import REFERENCE


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
    assert choice.choose_deployed(Problem(BlockGrid(64, 64, BlockSize(16, 16)), rank=2, rows=8)) == form
    assert all(not problem.training for problem in asked)
