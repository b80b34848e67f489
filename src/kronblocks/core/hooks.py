"""Forward hooks: the input and rows that reach a module, and hooks that copies of a module lose."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def forward_input(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    """The only input of a layer, given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(x: Tensor) -> int:
    """Number of rows of a layer's input: its elements divided by its features. Nested tensors work too."""
    return x.numel() // max(1, x.size(-1))


@contextlib.contextmanager
def rows_reaching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[int]]]:
    """Record how many rows each call of a layer gets, while the context is open.

    Yields:
        A list for each name in `layers`. Every call of the layer appends its number of rows.

    >>> import torch
    >>> layer = nn.Linear(4, 2)
    >>> with rows_reaching({"head": layer}) as rows:
    ...     _ = layer(torch.zeros(3, 5, 4)), layer(torch.zeros(7, 4))
    >>> rows
    {'head': [15, 7]}
    """
    rows: dict[str, list[int]] = {name: [] for name in layers}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: rows[name].append(rows_of(forward_input(args, kwargs)))

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        yield rows


class OwnHook:
    """A hook that runs a method of its owner, and does nothing in a copied or unpickled module."""

    def __init__(self, run: Callable[..., None] | None = None) -> None:
        self._run = run

    def __call__(self, *args: Any) -> None:
        if self._run is not None:
            self._run(*args)

    @property
    def owner(self) -> Any:
        """The object whose method runs; None in a copy."""
        return getattr(self._run, "__self__", None)

    def __reduce__(self) -> tuple[type[OwnHook], tuple[()]]:
        return OwnHook, ()
