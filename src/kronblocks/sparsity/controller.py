"""Drives the strength of a penalty so that a sparsity follows its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class PenaltyController:
    """A forecast of the penalty, corrected by what came of the last ones (equation 18 in docs/math.md).

    A shrink threshold is penalty times learning rate, so no fixed penalty fits two schedules of the rate. The forecast shrinks
    the last block that has to die by the next mask update to zero until then, if the loss did not push back; the correction,
    within a factor of `span` of 1, rises while fewer blocks are dead than wanted and falls while more are.
    """

    correction: float = 1.0
    gain: float = 2.0
    span: float = 10.0

    def penalty(self, *, score: float, rate: float, steps: int) -> float:
        """The penalty until the next update.

        Args:
            score: of the last block that has to die until then.
            rate: learning rate now.
            steps: how many there are until the block has to be dead.
        """
        return self.correction * score / max(rate * steps, 1e-30)

    def update(self, *, wanted: float, observed: float) -> float:
        """Move the correction for a wanted and an observed sparsity, both in [0, 1]; returns it.

        >>> controller = PenaltyController()
        >>> controller.update(wanted=0.5, observed=0.4) > 1 > controller.update(wanted=0.4, observed=0.6)
        True
        """
        moved = self.correction * math.exp(self.gain * (wanted - observed))
        self.correction = min(max(moved, 1 / self.span), self.span)
        return self.correction
