"""RankChoice: ranks chosen by the weights of a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kronblocks.core.checks import number
from kronblocks.core.errors import KronblocksError


@dataclass(frozen=True)
class RankChoice:
    """Choose the rank of each layer by the weights of a trained model. Give exactly one of the two.

    Args:
        max_error: each layer gets the least rank with |W - sum| / |W| at most this, in Frobenius norms. `sum` is the nearest
            Kronecker sum.
        max_parameters: the factors of all layers together have at most this share of the number of weights. Each further term
            goes to the layer where it removes most error per parameter.

    >>> RankChoice(max_error=0.3)
    RankChoice(max_error=0.3, max_parameters=None)
    """

    max_error: float | None = None
    max_parameters: float | None = None

    def __post_init__(self) -> None:
        if (self.max_error is None) == (self.max_parameters is None):
            raise KronblocksError(
                "give RankChoice either max_error=, a relative error of each layer, or max_parameters=, a share of the weights"
            )
        if self.max_error is not None:
            number("max_error", self.max_error, 0, 1, "the relative error of each layer's start, from 0 to below 1")
        if self.max_parameters is not None:
            number("max_parameters", self.max_parameters, 0, math.inf, "the factors' share of the weights, above 0")
