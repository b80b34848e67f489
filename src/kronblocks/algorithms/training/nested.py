"""Nested steps: torch runs hooks for an optimiser's step(), and again if that calls step() of its base class."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType

from torch.optim import Optimizer

from kronblocks.algorithms.training.stand_in import original

_STEP = next((code for code in Optimizer.profile_hook_step.__code__.co_consts if isinstance(code, CodeType)), None)
"""The code of torch's wrapper around each step(), which runs the hooks."""


def stepping() -> Iterator[Optimizer]:
    """The optimisers in whose steps this is called, the innermost first. An optimiser may occur twice."""
    frame = sys._getframe(1)  # not a counter, which an exception in a step would leave wrong
    while frame is not None:
        if frame.f_code is _STEP:
            yield original(frame.f_locals["self"])
        frame = frame.f_back


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step hook of this optimiser runs inside another of its steps."""
    steps = (each for each in stepping() if each is original(optimizer))
    return next(steps, None) is not None and next(steps, None) is not None
