"""Add parameters to running optimisers, and remove them, when surgery replaces layers."""

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
from kronblocks.surgery.carried_moments import carried_states
from kronblocks.surgery.groups import LIFTED

_GROUPS = {"coeff": "coefficients", "gate": "coefficients", "tiles": "tiles", "values": LIFTED}


def replace_parameters_(optimizers: Sequence[Optimizer], old: BlockLayer, new: BlockLayer) -> None:
    """Replace the parameters of an old layer by those of a new one in the optimisers; gradients are dropped.

    If an optimiser holds the old ones, the new layer's first parameter is the object of the old layer's first one, with other
    values. So it stays in lists of parameters, keeps hooks, and stays in an optimiser for it alone. New parameters join groups
    of the same `parameter_groups` call. Without such groups they take the place of the first old one. States are dropped, but
    lifted values get those that follow from their factors' (see `carried_states`).

    Args:
        optimizers: any. Those that hold the old parameters are changed, and optimisers that these wrap.
        old: the layer that was replaced. It computes as before, with another parameter object.
        new: the layer in its place.
    """
    gone, fresh = old.block_parameters(), new.block_parameters()
    names = {id(p): name for name, p in new.named_parameters(recurse=False)}
    fresh_names = [names[id(p)] for p in fresh]
    places, carried = _places(optimizers, gone), carried_states(optimizers, old, new)
    drop_parameters_(optimizers, gone)
    for parameter in fresh:
        vars(parameter).update(vars(gone[0]))  # tags that users and frameworks set on parameters
    if places:
        own = next(name for name, p in old.named_parameters(recurse=False) if p is gone[0])
        setattr(old, own, nn.Parameter(gone[0].data, gone[0].requires_grad))  # the old layer may be in another model too
        become_(gone[0], fresh[0])
        gone[0].requires_grad_(fresh[0].requires_grad)
        setattr(new, fresh_names[0], gone[0])
        fresh[0] = gone[0]
    else:  # a new object: `check_held` will find an optimiser that was not given here and holds the old one
        share_hooks_(fresh[0], gone[0])
    for place in places:
        for parameter, name in zip(fresh, fresh_names, strict=True):
            place.insert(parameter, name)
    for optimizer, state in carried:
        if any(p is fresh[0] for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[fresh[0]] = state


class _Place:
    """The place of a layer's old parameters in an optimiser, for the new ones."""

    def __init__(self, optimizer: Optimizer, home: dict[str, Any], first: int, gone: set[int]) -> None:
        self._optimizer, self._home = optimizer, home
        self._next = sum(id(p) not in gone for p in home["params"][:first])  # the index once old ones are removed
        self._layer = home["param_names"][first].rpartition(".")[0] if "param_names" in home else ""
        self._has_momentum = "momentum_buffer" in optimizer.state.get(home["params"][first], {})

    @property
    def has_lifted(self) -> bool:
        """Whether there is a group for lifted values of the same call."""
        return _beside(self._optimizer, self._home, LIFTED) is not None

    def insert(self, parameter: nn.Parameter, name: str) -> None:
        """Insert a parameter by its name in the layer."""
        group = _beside(self._optimizer, self._home, _GROUPS[name])
        if group is None:
            group, place = self._home, self._next
            self._next += 1
            if group.get("fused") and self._has_momentum:  # torch's fused SGD needs momenta of all of a group, or of none
                self._optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        else:
            place = len(group["params"])
        full_name = f"{self._layer}.{name}"
        self._prepare(group, parameter, full_name)
        group["params"].insert(place, parameter)
        if "param_names" in group:  # the optimiser was made with named parameters
            group["param_names"].insert(place, full_name)

    def _prepare(self, group: dict[str, Any], parameter: nn.Parameter, name: str) -> None:
        """Add and remove a temporary group, so that an optimiser prepares the parameter as it does when one joins (Lookahead)."""
        if type(self._optimizer).add_param_group is not Optimizer.add_param_group:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            named = "param_names" in group
            self._optimizer.add_param_group({**options, "params": [(name, parameter) if named else parameter]})
            self._optimizer.param_groups.pop()


def _places(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> list[_Place]:
    """The places for the successors of some parameters: in one optimiser that holds them, and in those that it wraps."""
    ids, found = {id(p) for p in gone}, []
    for optimizer in optimizers:
        places, lists = [], set()
        for each in with_inner([optimizer]):
            at = [(g, k) for g in each.param_groups for k, p in enumerate(g["params"]) if id(p) in ids]
            if at and id(at[0][0]["params"]) not in lists:  # a wrapped optimiser mostly shares the list
                home, first = next(((g, k) for g, k in at if g["params"][k] is gone[0]), at[0])
                lists.update(id(g["params"]) for g in each.param_groups)
                places.append(_Place(each, home, first, ids))
        if places:
            found.append((any(place.has_lifted for place in places), places))
    return max(found, key=lambda each: each[0], default=(False, []))[1]


def _beside(optimizer: Optimizer, home: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The group with this name from the same call of `parameter_groups` as another group.

    Groups without the number of a call are made by hand, or come from an older state. For them it is the next group of that
    name in the optimiser's order, or else the one before.
    """
    groups = optimizer.param_groups
    at = next(place for place, group in enumerate(groups) if group is home)
    found = [k for k, g in enumerate(groups) if g.get("name") == name and (PART not in home or g.get(PART) == home[PART])]
    later = [k for k in found if k >= at]
    return groups[(later or found[-1:])[0]] if found else None


def in_order_of_(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Sort the groups of factors and values in the order of `parameter_groups`, since states are saved by position."""
    order = {id(p): place for place, p in enumerate(model.parameters())}
    for optimizer in optimizers:
        numbered = any(PART in group for group in optimizer.param_groups)
        for group in optimizer.param_groups:
            if group.get("name") in _GROUPS.values() and (PART in group) == numbered:
                places = [order.get(id(p), len(order)) for p in group["params"]]
                _keep(group, sorted(range(len(places)), key=places.__getitem__))


def _keep(group: dict[str, Any], kept: Sequence[int]) -> None:
    """Keep only the parameters at these positions in a group."""
    for name in ("params", "param_names"):
        if name in group:
            group[name][:] = [group[name][place] for place in kept]


def drop_parameters_(optimizers: Sequence[Optimizer], gone: Sequence[Tensor]) -> None:
    """Remove parameters, and their state, from optimisers."""
    ids = {id(p) for p in gone}
    for optimizer in with_inner(optimizers):
        for group in optimizer.param_groups:
            _keep(group, [place for place, p in enumerate(group["params"]) if id(p) not in ids])
        for p in gone:
            forget_(optimizer, p)
    for p in gone:
        p.grad = None  # code that kept a list of parameters would count it in norms
