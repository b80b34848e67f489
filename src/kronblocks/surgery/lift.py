"""Lift factors to free block values, and free the slots of dead blocks, in models and in their optimisers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from kronblocks.algorithms.moments import keep_rows_, without_rows
from kronblocks.algorithms.training.attachment import check_apart, warn_of_hooks
from kronblocks.core.errors import KronblocksError, PerformanceWarning
from kronblocks.core.parameters import ParameterHook, drop_hooks_, hooks_that_end
from kronblocks.core.tables import some
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.surgery.optimizers import replace_parameters_
from kronblocks.surgery.replace import replace_


def lift_(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] = ()) -> list[str]:
    """Replace every Kronecker layer by a `BlockSparseLinear` with the same live blocks as free values, in place.

    The two-phase method does this at the right step. The optimiser gets the values, in the group "lifted" of their
    `parameter_groups` call, or in the factors' place. There `values` is the same parameter object as `coeff` was. So it stays in
    lists of parameters, and keeps hooks that were on all factors of the layer.

    Args:
        model: any model.
        optimizer: the optimiser or optimisers that hold the factors.

    Returns:
        The names of the lifted layers.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    names = [name for name, module in model.named_modules() if isinstance(module, KroneckerBlockLinear)]
    return lift_layers_(model, names, optimizers)


def lift_layers_(model: nn.Module, names: Iterable[str], optimizers: Sequence[Optimizer]) -> list[str]:
    """Lift the layers of these names, inside wrappers too. Layers that are lifted already stay.

    Raises:
        KronblocksError: another layer is in a place, or two layers share factors. Nothing has changed then.
    """
    layers = {}
    for name in names:
        place, old = _block_layer(model, name)
        if isinstance(old, KroneckerBlockLinear):
            layers[place] = old
        elif not isinstance(old, BlockSparseLinear):
            raise KronblocksError(
                f"the lift is due, but {name} is now {'missing' if old is None else f'a {type(old).__name__}'}, not the layer "
                "that sparsify_ made: leave layers in their places, or choose a method without a lift"
            )
    check_apart({name: old.block_parameters() for name, old in layers.items()})
    ending = {}
    for name, old in layers.items():
        new = BlockSparseLinear.from_kron(old)
        new.values.requires_grad_(old.coeff.requires_grad)
        replace_(model, name, new)
        ending |= hand_over_(optimizers, name, old, new)
    warn_of_hooks(ending, "ended at the lift")
    return list(layers)


def hand_over_(optimizers: Sequence[Optimizer], name: str, old: BlockLayer, new: BlockLayer) -> dict[str, list[ParameterHook]]:
    """Replace the parameters of an old layer by those of a new one in the optimisers.

    Returns:
        The hooks that ended, by the full name of their parameter.
    """
    ids = {id(p) for p in old.block_parameters()}
    ending = hooks_that_end({f"{name}.{key}": p for key, p in old.named_parameters() if id(p) in ids})
    drop_hooks_(old.block_parameters()[0], [hook for hooks in ending.values() for hook in hooks])
    replace_parameters_(optimizers, old, new)
    return ending


def compact_(model: nn.Module, names: Iterable[str], optimizers: Sequence[Optimizer]) -> bool:
    """Free the slots of dead blocks, in the optimisers' state too. Whether there were any.

    A layer keeps its slots, with a warning, if an optimiser's state for it does not have one row per slot.
    """
    changed, left = False, {}
    for name in names:
        place, layer = _block_layer(model, name)
        if not isinstance(layer, BlockSparseLinear) or not layer.has_dead_slots:
            continue
        if (reason := without_rows(optimizers, layer.values)) is not None:
            left[place] = reason
            continue
        keep_rows_(optimizers, layer.values, layer.compact_())
        changed = True
    if left:
        warnings.warn(
            f"values of {some(left)} keep the slots of dead blocks, and their memory: {next(iter(left.values()))}, "
            "which cannot be cut to the live blocks. All else is as usual",
            PerformanceWarning,
            stacklevel=2,
        )
    return changed


def _block_layer(model: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    """The block layer of this name, also inside a wrapper there (checkpoint_wrapper, LoRA), and its place."""
    try:
        found = model.get_submodule(name)
    except AttributeError:  # a module around it has been replaced
        return name, None
    inside = [(place, each) for place, each in found.named_modules() if isinstance(each, BlockLayer)]
    if len(inside) != 1:
        return name, found
    place, layer = inside[0]
    return f"{name}.{place}" if place else name, layer
