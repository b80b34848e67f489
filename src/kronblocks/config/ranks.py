"""RankChoice: ranks chosen for a trained model instead of given."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError


@dataclass(frozen=True)
class RankChoice:
    """Ranks chosen for a trained model instead of given: exactly one of the two.

    Args:
        max_error: each layer takes the least rank whose Kronecker sum is this near to its weight, |W - sum| / |W| in Frobenius
            norms.
        max_parameters: the factors of all layers together have at most this share of their weights; each further term goes to
            the layer where it removes most error per parameter.

    >>> RankChoice(max_error=0.3)
    RankChoice(max_error=0.3, max_parameters=None)
    """

    max_error: float | None = None
    max_parameters: float | None = None

    def __post_init__(self) -> None:
        if (self.max_error is None) == (self.max_parameters is None):
            raise KronblocksError(
                "RankChoice takes one of max_error=, a relative error of each layer, and max_parameters=, a share of the weights"
            )
        if self.max_error is not None:
            number("max_error", self.max_error, 0, 1, "the relative error of each layer's start, from 0 to below 1")
        if self.max_parameters is not None:
            number("max_parameters", self.max_parameters, 0, math.inf, "the factors' share of the weights, above 0")
