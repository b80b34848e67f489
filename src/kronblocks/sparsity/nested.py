"""Steps inside steps: torch runs hooks for the step() of an optimiser, and again for that of its base class inside it."""

from __future__ import annotations

import sys
from types import CodeType

from torch.optim import Optimizer

_STEP = next((code for code in Optimizer.profile_hook_step.__code__.co_consts if isinstance(code, CodeType)), None)
"""What runs hooks around each step() of a class."""


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step hook of this optimiser runs inside another of its steps."""
    frame, steps = sys._getframe(1), 0  # the stack and no counter, which an exception in a step would leave wrong
    while frame is not None and steps < 2:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back
    return steps == 2
