"""Replace modules in all their places, and use models without changing them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kronblocks.core.errors import KronblocksError
from kronblocks.nn.unfolded import Unfolded, unfolded
from kronblocks.surgery.belongings import carry_over_


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    return model


def replace_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module of this name in all its places. Users' hooks and attributes move to the new one.

    Raises:
        KronblocksError: the model itself is the module.
    """
    old = model.get_submodule(name)
    if old is model:
        raise KronblocksError("the model itself is the layer, which cannot be replaced in place: wrap it in nn.Sequential(...)")
    carry_over_(old, new)
    for parent in model.modules():
        for child, module in list(parent._modules.items()):  # named_children() omits the second of two places
            if module is old:
                setattr(parent, child, new)
                initialize: Any = getattr(parent, "_initialize", None)
                if child == "_orig_mod" and initialize is not None:  # torch.compile would still call the old one
                    initialize()


@contextlib.contextmanager
def unfolding(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """Unfold the convolutions and Conv1D of these names; if an exception follows, put the originals back.

    Yields:
        The original modules, by name.

    Raises:
        KronblocksError: a module is neither a convolution nor a Conv1D.
    """
    originals: dict[str, nn.Module] = {}
    try:
        for name in names:
            old = dict(model.named_modules()).get(name)
            if isinstance(old, Unfolded):
                continue
            new = unfolded(old, convolutions=True) if old is not None else None
            if old is None or new is None:
                raise KronblocksError(f"{name!r} is a {type(old).__name__} in the model, not a convolution: use the same model")
            replace_(model, name, new)
            originals[name] = old
        yield originals
    except BaseException:
        fold_(model, originals)
        raise


def to_unfold(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the modules to unfold so that the model has the linear layers of these names, as `select` gives them."""
    there = dict(model.named_modules())
    return [name.rpartition(".")[0] for name in layers if name not in there]


def fold_(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Put the original modules back."""
    for name, old in originals.items():
        replace_(model, name, old)


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Use the model in eval mode; afterwards each module has its own mode again."""
    return in_mode(model, training=False)


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Use the model in training or eval mode; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
