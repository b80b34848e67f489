"""Optimiser parameter groups for sparse models, and what surgery does to an optimiser that is already running."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kronblocks.checks import number
from kronblocks.errors import KronblocksError
from kronblocks.nn.base import BlockLayer
from kronblocks.nn.block_sparse_linear import BlockSparseLinear
from kronblocks.nn.kron_linear import KroneckerBlockLinear
from kronblocks.parameters import become_, share_hooks_
from kronblocks.sparsity.attachment import PART
from kronblocks.sparsity.moments import forget_, with_inner

FACTOR_LR_SCALE = 1.0
TILE_LR_SCALE = 1.0
LIFTED_LR_SCALE = 1.5
LIFTED = "lifted"
_calls = itertools.count()  # of parameter_groups: groups of one call belong together, wherever an optimiser puts them


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    factor_lr_scale: float = FACTOR_LR_SCALE,
    tile_lr_scale: float = TILE_LR_SCALE,
    lifted_lr_scale: float = LIFTED_LR_SCALE,
    factor_weight_decay: float = 0.0,
    lifted_weight_decay: float | None = None,
    keep_empty: bool = True,
) -> list[dict[str, Any]]:
    """Groups for an optimiser: "dense", "no-decay" (biases, norms), "coefficients", "tiles", and "lifted", empty till the lift.

    Give it the rate that suits the dense model; lifted values want a larger one (1.5 times by default; see the ablation in
    docs/experiments.md). All five groups are always there, so that learning-rate schedules and resumed runs agree. They share a
    number, "part": call this for each part of a model that has rates of its own, add the lists up, and lifted values join the
    group "lifted" of their part.

    Args:
        model: after `sparsify_`.
        lr: learning rate of everything that is not sparse.
        weight_decay: of the group "dense"; biases and one-dimensional parameters get none.
        factor_lr_scale: rate of `coeff`, `tiles` and `gate`, relative to `lr`.
        tile_lr_scale: rate of `tiles`, relative to that of the other factors.
        lifted_lr_scale: rate of `values`, relative to `lr`.
        factor_weight_decay: of `coeff`, `tiles` and `gate`.
        lifted_weight_decay: of `values`; None: as factors.
        keep_empty: False leaves groups without parameters out: torch's distributed checkpoints refuse more than one of them.

    >>> model = nn.Sequential(KroneckerBlockLinear(8, 6, 2, rank=1), nn.Linear(6, 3))
    >>> [(group["name"], len(group["params"])) for group in parameter_groups(model, lr=1e-3, weight_decay=0.1)]
    [('dense', 1), ('no-decay', 2), ('coefficients', 1), ('tiles', 1), ('lifted', 0)]
    """
    if not isinstance(model, nn.Module):
        raise KronblocksError(f"parameter_groups wants the model, not {type(model).__name__}")
    scales = {"factor_lr_scale": factor_lr_scale, "tile_lr_scale": tile_lr_scale, "lifted_lr_scale": lifted_lr_scale}
    for name, value in {"lr": lr, **scales}.items():
        number(name, value, 0, float("inf"), "a number from 0 on")
    coefficients, tiles, lifted = [], [], []
    for module in model.modules():
        if isinstance(module, KroneckerBlockLinear):
            tiles.append(module.tiles)
            coefficients += [p for p in module.block_parameters() if p is not module.tiles]
        elif isinstance(module, BlockSparseLinear):
            lifted += module.block_parameters()
    taken = {id(p) for p in coefficients + tiles + lifted}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        ("dense", [p for p in rest if p.dim() > 1], 1.0, weight_decay),
        ("no-decay", [p for p in rest if p.dim() <= 1], 1.0, 0.0),
        ("coefficients", coefficients, factor_lr_scale, factor_weight_decay),
        ("tiles", tiles, factor_lr_scale * tile_lr_scale, factor_weight_decay),
        (LIFTED, lifted, lifted_lr_scale, factor_weight_decay if lifted_weight_decay is None else lifted_weight_decay),
    ]
    part = next(_calls)
    return [
        {"params": [p for p in params if p.requires_grad], "lr": lr * scale, "weight_decay": decay, "name": name, PART: part}
        for name, params, scale, decay in groups
        if params or keep_empty
    ]


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


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimiser's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
