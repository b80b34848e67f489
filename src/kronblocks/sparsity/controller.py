"""Drives the strength of a penalty so that a sparsity follows its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class PenaltyController:
    """A proportional controller in the logarithm of the penalty (equation 18 in docs/math.md).

    A shrink threshold is penalty times learning rate, so no fixed penalty fits two schedules of the rate; this one is
    raised while too few blocks are dead and lowered while too many are, within a factor of `span` of where it began.
    """

    penalty: float
    gain: float = 4.0
    span: float = 1e4
    initial: float | None = None

    def __post_init__(self) -> None:
        self.initial = self.penalty if self.initial is None else self.initial

    def update(self, *, wanted: float, observed: float) -> float:
        """Move the penalty for a wanted and an observed sparsity, both in [0, 1]; returns it.

        >>> controller = PenaltyController(0.1)
        >>> controller.update(wanted=0.5, observed=0.4) > 0.1 > controller.update(wanted=0.4, observed=0.6)
        True
        """
        assert self.initial is not None
        moved = self.penalty * math.exp(self.gain * (wanted - observed))
        self.penalty = min(max(moved, self.initial / self.span), self.initial * self.span)
        return self.penalty

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        assert self.initial is not None
        return {"penalty": self.penalty, "initial": self.initial}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.penalty, self.initial = state["penalty"], state["initial"]
