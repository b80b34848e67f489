"""What surgery does to an optimiser that is already running: parameters join it, and leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.algorithms.moments import forget_, with_inner
from kronblocks.algorithms.training.attachment import PART
from kronblocks.core.parameters import become_, share_hooks_
from kronblocks.nn.base import BlockLayer
from kronblocks.surgery.groups import LIFTED

_GROUPS = {"coeff": "coefficients", "gate": "coefficients", "tiles": "tiles", "values": LIFTED}


def replace_parameters_(optimizers: Sequence[Optimizer], old: BlockLayer, new: BlockLayer) -> None:
    """Let optimisers go on with the parameters of the layer that has taken another's place; state and gradients are dropped.

    Where an optimiser holds the old ones, the first of the new ones is the old layer's first, given other values: whatever holds
    that parameter (lists, hooks, an optimiser for it alone) goes on with it. In the optimisers they join the groups that came
    with the old ones' groups, by one call of `parameter_groups`, or, where there are none, take the first old one's place.

    Args:
        optimizers: any; those of the old parameters are changed, with optimisers that they keep inside.
        old: the layer that was replaced. It computes as before, with a parameter object of its own.
        new: the layer in its place.
    """
    gone, fresh = old.block_parameters(), new.block_parameters()
    names = {id(p): name for name, p in new.named_parameters(recurse=False)}
    fresh_names = [names[id(p)] for p in fresh]
    places = _places(optimizers, gone)
    drop_parameters_(optimizers, gone)
    for parameter in fresh:
        vars(parameter).update(vars(gone[0]))  # tags that users and frameworks set on parameters
    if places:
        own = next(name for name, p in old.named_parameters(recurse=False) if p is gone[0])
        setattr(old, own, nn.Parameter(gone[0].data, gone[0].requires_grad))  # the old layer may stand in another model too
        become_(gone[0], fresh[0])
        gone[0].requires_grad_(fresh[0].requires_grad)
        setattr(new, fresh_names[0], gone[0])
        fresh[0] = gone[0]
    else:  # what an optimiser that is not given here remembers has the old shape: let it be seen that it does not have this one
        share_hooks_(fresh[0], gone[0])
    for place in places:
        for parameter, name in zip(fresh, fresh_names, strict=True):
            place.insert(parameter, name)


class _Place:
    """Where the parameters of a layer stood in an optimiser, and others are to stand."""

    def __init__(self, optimizer: Optimizer, home: dict[str, Any], first: int, gone: set[int]) -> None:
        self._optimizer, self._home = optimizer, home
        self._next = sum(id(p) not in gone for p in home["params"][:first])  # once those that are gone are out
        self._layer = home["param_names"][first].rpartition(".")[0] if "param_names" in home else ""
        self._has_momentum = "momentum_buffer" in optimizer.state.get(home["params"][first], {})

    @property
    def has_lifted(self) -> bool:
        """Whether the home has a group for lifted values beside it."""
        return _beside(self._optimizer, self._home, LIFTED) is not None

    def insert(self, parameter: nn.Parameter, name: str) -> None:
        """Put a parameter of the layer in, by its name there."""
        group = _beside(self._optimizer, self._home, _GROUPS[name])
        if group is None:
            group, place = self._home, self._next
            self._next += 1
            if group.get("fused") and self._has_momentum:  # torch's fused SGD wants momenta of all of a group, or of none
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        else:
            place = len(group["params"])
        full_name = f"{self._layer}.{name}"
        self._prepare(group, parameter, full_name)
        group["params"].insert(place, parameter)
        if "param_names" in group:  # of torch's named parameters
            group["param_names"].insert(place, full_name)

    def _prepare(self, group: dict[str, Any], parameter: nn.Parameter, name: str) -> None:
        """Let an optimiser that prepares parameters when they join it (Lookahead) do that, in a group that goes again."""
        if type(self._optimizer).add_param_group is not Optimizer.add_param_group:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            named = "param_names" in group
            self._optimizer.add_param_group({**options, "params": [(name, parameter) if named else parameter]})
            self._optimizer.param_groups.pop()


def _places(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> list[_Place]:
    """Where the successors of some parameters belong: in one of the optimisers that hold them, and in what that keeps inside."""
    ids, found = {id(p) for p in gone}, []
    for optimizer in optimizers:
        places, lists = [], set()
        for each in with_inner([optimizer]):
            at = [(g, k) for g in each.param_groups for k, p in enumerate(g["params"]) if id(p) in ids]
            if at and id(at[0][0]["params"]) not in lists:  # an optimiser inside mostly shares the list
                home, first = next(((g, k) for g, k in at if g["params"][k] is gone[0]), at[0])
                lists.update(id(g["params"]) for g in each.param_groups)
                places.append(_Place(each, home, first, ids))
        if places:
            found.append((any(place.has_lifted for place in places), places))
    return max(found, key=lambda each: each[0], default=(False, []))[1]


def _beside(optimizer: Optimizer, home: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The group of a name that came with another group, by one call of `parameter_groups`.

    Groups that carry no number of a call (made by hand, or loaded from a state of an earlier version) belong to the next of
    that name in the optimiser's order, or else to the one before.
    """
    groups = optimizer.param_groups
    at = next(place for place, group in enumerate(groups) if group is home)
    found = [k for k, g in enumerate(groups) if g.get("name") == name and (PART not in home or g.get(PART) == home[PART])]
    later = [k for k in found if k >= at]
    return groups[(later or found[-1:])[0]] if found else None


def in_order_of_(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Sort the groups of factors and of values as `parameter_groups` does: states are saved by place."""
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for optimizer in optimizers:
        numbered = any(PART in group for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            if group.get("name") in _GROUPS.values() and (PART in group) == numbered:
                places = [order.get(id(p), len(order)) for p in group["params"]]
                _keep(group, sorted(range(len(places)), key=places.__getitem__))


def _keep(group: dict[str, Any], kept: Sequence[int]) -> None:
    """Let a group go on with the parameters at these places."""
    for name in ("params", "param_names"):
        if name in group:
            group[name][:] = [group[name][place] for place in kept]


def drop_parameters_(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> None:
    """Let optimisers forget parameters that are no longer part of the model, and their state."""
    ids = {id(p) for p in gone}
    for optimizer in with_inner(optimizers):
        for group in optimizer.param_groups:
            _keep(group, [place for place, p in enumerate(group["params"]) if id(p) not in ids])
        for p in gone:
            forget_(optimizer, p)
    for p in gone:
        p.grad = None  # whoever kept a list of parameters would count it in norms
