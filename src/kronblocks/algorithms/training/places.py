"""Which layers are in the places of the targets now, with which parameters: surgery replaces them, and so may the user."""

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
"""Attribute of a module whose place the library has given to another one: that one."""


class Now(NamedTuple):
    """What is in the places of the targets."""

    targets: list[BlockTarget]  # those that are gone as they were
    gone: dict[str, str]  # what has taken their places, by name


class Places:
    """The layers that a sparsifier follows. Only `follow_` and `note_parameters_` take what has changed for what is meant.

    Args:
        model: whose layers they are.
        targets: they, in the model's order.
    """

    def __init__(self, model: nn.Module, targets: Sequence[BlockTarget]) -> None:
        self.model, self.targets = model, list(targets)
        self._known: list[nn.Parameter] = []  # that held the blocks when they were noted last
        self._wrappers: list[Any] = []  # DistributedDataParallel around the model, in weak references

    def __getstate__(self) -> dict[str, Any]:  # a copy is another model, in no optimiser and no wrapper
        return {**self.__dict__, "_known": [], "_wrappers": []}

    def now(self) -> Now:
        """The targets as they are in the model now. Nothing is changed."""
        found = [(target, target_now(self.model, target)) for target in self.targets]
        gone = {target.name: stands_there(self.model, target) for target, now in found if now is None}
        return Now([now or target for target, now in found], gone)

    def follow_(self, *, strict: bool = False) -> bool:
        """Go on with the layers that are there now; whether there are others than before.

        Raises:
            KronblocksError: some were replaced by something else, and `strict` is set.
        """
        now, gone = self.now()
        changed = not _same(now, self.targets)
        self.targets[:] = now
        if strict:
            check_none_replaced(gone)
        return changed

    def attach_(self, ddp: nn.Module | None) -> None:
        """Find what is around the model, and know no parameters yet."""
        self._wrappers, self._known = around(self.model, ddp), []

    def detach_(self) -> None:
        """Forget the parameters."""
        self._known = []

    def tell_wrappers_(self) -> None:
        """Let what is around the model know the parameters that it has now."""
        follow_replaced_parameters(self.model, self._wrappers)

    def note_parameters_(self, optimizers: Sequence[Optimizer]) -> list[Any]:
        """Look at the parameters that hold the blocks now: optimisers must have them, and new weights get a hook.

        Returns:
            The new hooks' handles.

        Raises:
            KronblocksError: no optimiser has some.
        """
        now = [p for target in self.targets for p in target.parameters()]
        if _same(now, self._known):
            return []
        check_held(optimizers, self.targets)
        known = {id(p) for p in self._known}
        self._known = now
        changed = [target for target in self.targets if not all(id(p) in known for p in target.parameters())]
        return [handle for target in changed for handle in target.hook_gradients()]


def _same(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects, one by one."""
    return len(now) == len(before) and all(map(operator.is_, now, before))


def target_now(model: nn.Module, target: BlockTarget) -> BlockTarget | None:
    """A target as it is in the model now.

    Returns:
        The same where its layer is there, wrapped or moved perhaps; one of the layer that the library, or a block layer of the
        same grid that the user, has put in its place; None where it was replaced by something else, or is gone.
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
    """What has taken a target's place, in words."""
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
    """Refuse to go on without layers.

    Args:
        gone: what is in the places of layers, by name.

    Raises:
        KronblocksError: there are any.
    """
    if gone:
        listed = some((f"{name}: {there}" for name, there in gone.items()), 3, join="; ")
        raise KronblocksError(
            f"{len(gone)} of the layers that the sparsifier follows {'was' if len(gone) == 1 else 'were'} replaced or changed "
            f"after sparsify_ ({listed}). Replace layers before sparsify_, leave those that will change out, such as "
            f"exclude=({next(iter(gone))!r},), or call sparsify_ again: block layers go on as sparse as they are"
        )


def _has_its_weight(target: BlockTarget) -> bool:
    """Whether a plain layer still has a weight of its own, and of the size that it had."""
    if not target.is_plain:
        return True
    if parametrize.is_parametrized(target.module) or hasattr(target.module, "weight_orig") or hasattr(target.module, "weight_v"):
        return False
    weight = target.module._parameters.get("weight")
    sizes = (target.grid.out_features, target.grid.in_features)
    return weight is None or weight.dim() != 2 or weight.shape == torch.Size(sizes)  # a flattened one is told of by `attach`


def _is_around(module: nn.Module) -> bool:
    """Whether it only shows the attributes of a layer that it is wrapped around, as checkpoint_wrapper does."""
    return any(has_blocks(each) for each in module.modules() if each is not module)


def _successors(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that the library has put in a module's place, one after another."""
    seen = [module]
    while (later := vars(seen[-1]).get(SUCCESSOR)) is not None and all(later is not each for each in seen):
        seen.append(later)
        yield later


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # it has been wrapped
        return None
