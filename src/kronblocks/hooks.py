"""What a module hook is called with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def forward_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a layer that takes one, whether its forward was called with it by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(x: Tensor) -> int:
    """How many rows of features a layer's input has, of whatever shape; a nested one, which has none, too."""
    return x.numel() // max(1, x.size(-1))
