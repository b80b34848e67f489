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


class Onlooker:
    """A forward hook or pre-hook that needs no numbers, only shapes, dtypes and places in the graph of autograd.

    A convolution that does not copy the rows of its linear layer gives such hooks other tensors. Pre-hooks, called with keyword
    arguments, get one feature of as many rows; hooks get the convolution's result. All other hooks make it copy rows.
    """


class _NotesRows(Onlooker):
    def __init__(self, calls: list[tuple[int, ...]]) -> None:
        self._calls = calls

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        x = forward_input(args, kwargs)
        self._calls.append((rows_of(x),) if x.is_nested else tuple(x.shape[:-1]))


@contextlib.contextmanager
def rows_reaching(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Record how many rows each call of a layer gets, while the context is open.

    Yields:
        A list for each name in `layers`. Every call of the layer appends its input's shape, without the features.

    >>> import torch
    >>> layer = nn.Linear(4, 2)
    >>> with rows_reaching({"head": layer}) as rows:
    ...     _ = layer(torch.zeros(3, 5, 4)), layer(torch.zeros(7, 4))
    >>> rows
    {'head': [(3, 5), (7,)]}
    """
    rows: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(_NotesRows(rows[name]), with_kwargs=True).remove)
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
