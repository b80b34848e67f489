"""Find the targets in the model again after the library, or the user, has replaced layers or parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from kronblocks.algorithms.masked import MaskedLinear
from kronblocks.algorithms.protocol import has_blocks
from kronblocks.algorithms.targets import BlockTarget
from kronblocks.algorithms.training.attachment import check_held
from kronblocks.algorithms.training.distributed import around, follow_replaced_parameters
from kronblocks.core.errors import KronblocksError
from kronblocks.core.tables import some

SUCCESSOR = "replaced_by"
"""Attribute of a replaced module: the module that the library has put in its place."""


class Now(NamedTuple):
    """The targets as they are in the model now."""

    targets: list[BlockTarget]  # replaced ones as they were
    gone: dict[str, str]  # name of each replaced target, and what is there now


class Places:
    """The layers that a sparsifier follows. Only `follow_` and `note_parameters_` accept changes of the model.

    Args:
        model: the model.
        targets: its targeted layers, in the model's order.
    """

    def __init__(self, model: nn.Module, targets: Sequence[BlockTarget]) -> None:
        self.model, self.targets = model, list(targets)
        self._known: list[nn.Parameter] = []  # the parameters noted last
        self._wrappers: list[Any] = []  # weak references to each DistributedDataParallel around the model

    def __getstate__(self) -> dict[str, Any]:  # a copy is another model, in no optimiser and no wrapper
        return {**self.__dict__, "_known": [], "_wrappers": []}

    def now(self) -> Now:
        """The targets as they are in the model now. This changes nothing."""
        found = [(target, target_now(self.model, target)) for target in self.targets]
        gone = {target.name: stands_there(self.model, target) for target, now in found if now is None}
        return Now([now or target for target, now in found], gone)

    def follow_(self, *, strict: bool = False) -> bool:
        """Accept the layers that are there now. Whether they have changed.

        Raises:
            KronblocksError: the user has replaced some, and `strict` is set.
        """
        now, gone = self.now()
        changed = not same(now, self.targets)
        self.targets[:] = now
        if strict:
            check_none_replaced(gone)
        return changed

    def attach_(self, ddp: nn.Module | None) -> None:
        """Begin to follow: find the wrappers of the model, and forget the known parameters."""
        self._wrappers, self._known = around(self.model, ddp), []

    def detach_(self) -> None:
        """Forget the parameters."""
        self._known = []

    def tell_wrappers_(self) -> None:
        """Tell the wrappers of the model its present parameters."""
        follow_replaced_parameters(self.model, self._wrappers)

    def note_parameters_(self, optimizers: Sequence[Optimizer]) -> list[Any]:
        """Accept the parameters that hold the blocks now, and hook new weights. Optimisers must hold them.

        Returns:
            The new hooks' handles.

        Raises:
            KronblocksError: no optimiser holds some of them.
        """
        now = [p for target in self.targets for p in target.parameters()]
        if same(now, self._known):
            return []
        check_held(optimizers, self.targets)
        known = {id(p) for p in self._known}
        self._known = now
        changed = [target for target in self.targets if not all(id(p) in known for p in target.parameters())]
        return [handle for target in changed for handle in target.hook_gradients()]


def same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects, one by one."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def target_now(model: nn.Module, target: BlockTarget) -> BlockTarget | None:
    """A target as it is in the model now.

    Returns:
        The same target, if its layer is still there (wrapped or moved, perhaps). A new one, if the library has replaced the
        layer, or the user by a block layer with the same grid. None, if something else is there, or nothing.
    """
    found = _module_at(model, target.name)
    if found is not None and any(each is target.module for each in found.modules()):
        return target if _has_its_weight(target) else None
    if found is not None:
        inside = [each for each in found.modules() if not _is_around(each) and has_blocks(each)]
        if len(inside) == 1 and inside[0].grid == target.grid:
            return BlockTarget(target.name, inside[0])
        if type(found) is nn.Linear and any(each is found for each in _successors(target.module)):
            return BlockTarget(target.name, MaskedLinear(found, target.grid, target.mask))
    is_elsewhere = any(each is target.module for each in model.modules())
    return target if is_elsewhere and _has_its_weight(target) else None


def stands_there(model: nn.Module, target: BlockTarget) -> str:
    """What is in a target's place now, in words."""
    found = _module_at(model, target.name)
    if found is None:
        return "nothing stands there now"
    if found is target.module and "weight" not in found._parameters:
        return "its weight is computed from others now"
    shape = getattr(getattr(found, "weight", None), "shape", ())
    sizes = f" of {'x'.join(map(str, shape))}" if shape else ""
    if found is target.module:
        return f"its weight is one{sizes} now"
    kind, alike = type(found), type(found).__name__ == type(target.module).__name__
    name = f"{kind.__module__}.{kind.__name__}" if alike and kind is not type(target.module) else kind.__name__
    return f"a {name}{sizes} stands there now"


def check_none_replaced(gone: Mapping[str, str]) -> None:
    """Raise KronblocksError if layers were replaced: `gone` has their names, and what is there now."""
    if gone:
        listed = some((f"{name}: {there}" for name, there in gone.items()), 3, join="; ")
        raise KronblocksError(
            f"{len(gone)} of the layers that the sparsifier follows {'was' if len(gone) == 1 else 'were'} replaced or changed "
            f"after sparsify_ ({listed}). Replace layers before sparsify_, leave those that will change out, such as "
            f"exclude=({next(iter(gone))!r},), or call sparsify_ again: block layers go on as sparse as they are"
        )


def _has_its_weight(target: BlockTarget) -> bool:
    """Whether a plain layer still has a weight parameter of its former size."""
    if not target.is_plain:
        return True
    if parametrize.is_parametrized(target.module) or hasattr(target.module, "weight_orig") or hasattr(target.module, "weight_v"):
        return False
    weight = target.module._parameters.get("weight")
    sizes = (target.grid.out_features, target.grid.in_features)
    return weight is None or weight.dim() != 2 or weight.shape == torch.Size(sizes)  # `attach` raises for a flattened one


def _is_around(module: nn.Module) -> bool:
    """Whether a module wraps another and shows its attributes, as checkpoint_wrapper does."""
    return any(has_blocks(each) for each in module.modules() if each is not module)


def _successors(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that the library has put in a module's place, in order."""
    seen = [module]
    while (later := vars(seen[-1]).get(SUCCESSOR)) is not None and all(later is not each for each in seen):
        seen.append(later)
        yield later


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # the module has been wrapped
        return None
