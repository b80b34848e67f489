"""What a module hook is called with, and hooks that copies do not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def forward_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The input of a layer that takes one, whether its forward was called with it by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(x: Tensor) -> int:
    """How many rows of features a layer's input has, of whatever shape; a nested one, which has none, too."""
    return x.numel() // max(1, x.size(-1))


class OwnHook:
    """A hook that does nothing in a copy of the module, or in a pickled one: what it serves belongs to the module itself."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        if self._run is not None:
            self._run(*args)

    @property
    def owner(self) -> Any:
        """Whose method it runs; None in a copy."""
        return getattr(self._run, "__self__", None)

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:
        return OwnHook, ()
