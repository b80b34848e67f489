"""Putting modules into the places of others, in every place where they stand, and looking at models without changing them."""

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
    """Put a module at every place where the one of this name stands; what users have put on the old one goes on on it.

    Raises:
        KronblocksError: the model itself is the module.
    """
    old = model.get_submodule(name)
    if old is model:
        raise KronblocksError("the model is itself the layer, which cannot be replaced in place: wrap it in nn.Sequential(...)")
    carry_over_(old, new)
    for parent in model.modules():
        for child, module in list(parent._modules.items()):  # named_children() would leave out the second of two places
            if module is old:
                setattr(parent, child, new)
                initialize: Any = getattr(parent, "_initialize", None)
                if child == "_orig_mod" and initialize is not None:  # torch.compile would go on calling the old one
                    initialize()


@contextlib.contextmanager
def unfolding(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Module]]:
    """Convolutions of these names become linear layers over patches, transformers' Conv1D plain ones; on an error, all back.

    Gives the modules that stood there, by name.

    Raises:
        KronblocksError: one of them is none of these.
    """
    originals: dict[str, nn.Module] = {}
    try:
        for name in names:
            old = dict(model.named_modules()).get(name)
            if isinstance(old, Unfolded):
                continue
            new = unfolded(old, convolutions=True) if old is not None else None
            if old is None or new is None:
                raise KronblocksError(f"{name!r} is a {type(old).__name__} in the model, and no convolution: use the same model")
            replace_(model, name, new)
            originals[name] = old
        yield originals
    except BaseException:
        fold_(model, originals)
        raise


def to_unfold(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the modules to unfold so that a model has the linear layers of these names, as `select` gives them."""
    there = dict(model.named_modules())
    return [name.rpartition(".")[0] for name in layers if name not in there]


def fold_(model: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Put modules back where they stood."""
    for name, old in originals.items():
        replace_(model, name, old)


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model in eval mode; afterwards each module is in its own again."""
    return in_mode(model, training=False)


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode; afterwards each module is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
